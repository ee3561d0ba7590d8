"""fp16 products accumulated in fp16: what cuBLAS is asked for is the product that is wanted, and who may ask."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from daramgpt import teacher
from daramgpt.errors import UserError
from daramgpt.teacher import half_accumulation

HANDLE = 1234


def columns(address: int, num_rows: int, num_columns: int, stride: int) -> NDArray[np.float16]:
    """The matrix that cuBLAS reads at an address: column by column, `stride` numbers from one to the next."""
    assert stride >= num_rows
    memory = (ctypes.c_uint16 * (stride * num_columns)).from_address(address)
    return np.frombuffer(memory, dtype=np.float16).reshape(num_columns, stride).T[:num_rows]


def factor(address: int) -> float:
    return float(np.frombuffer((ctypes.c_uint16 * 1).from_address(address), dtype=np.float16)[0])


def gemm(*arguments: Any) -> int:
    """C = alpha · op(A) · op(B) + beta · C on the host, as cuBLAS documents it, from the same C types."""
    handle, trans_a, trans_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, kind, _ = arguments
    assert handle == HANDLE
    assert (a_type, b_type, c_type, kind) == (2, 2, 2, 64)
    left = columns(a, k, m, lda).T if trans_a else columns(a, m, k, lda)
    right = columns(b, n, k, ldb).T if trans_b else columns(b, k, n, ldb)
    target = columns(c, m, n, ldc)
    target[:] = factor(alpha) * (left.astype(np.float64) @ right.astype(np.float64)) + factor(beta) * target
    return 0


LIBRARY = ctypes.CFUNCTYPE(ctypes.c_int, *half_accumulation.ARGUMENTS)(gemm)


@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,)], ids=str)
def test_the_arguments_mean_the_product(leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(*leading, 7, generator=generator).half()
    weight = torch.randn(4, 7, generator=generator).half()
    output = torch.zeros(*leading, 4, dtype=torch.float16)
    half_accumulation.multiply(LIBRARY, HANDLE, inputs, weight, output)
    expected = inputs.double() @ weight.double().T
    assert (output.double() - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_status_is_an_error() -> None:
    ones = torch.ones(2, 2, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with status 13"):
        half_accumulation.multiply(lambda *_: 13, HANDLE, ones, ones, ones.clone())


@pytest.mark.parametrize(("precision", "dtype"), [("int8", torch.float16), ("fp32", torch.float32)], ids=str)
def test_without_a_gpu_it_is_refused(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=8, n_embd=8, n_head=2, n_layer=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"teacher\.half_accumulation: only int8 rows computed in fp16 on a GPU"):
        teacher.load(tmp_path, precision, dtype, torch.device("cpu"), half_accumulation=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_drifts_little() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 1920, generator=generator).cuda().half()
    weight = (0.02 * torch.randn(640, 1920, generator=generator)).cuda().half()
    bias = torch.randn(640, generator=generator).cuda().half()
    expected = inputs.double() @ weight.double().T + bias.double()
    error = half_accumulation.product(inputs, weight, bias).double() - expected
    # A sum of 1,920 products in fp16, each step rounded to 2^-11 of the sum so far: one part in a hundred at most.
    assert error.norm() < 0.02 * expected.norm()
