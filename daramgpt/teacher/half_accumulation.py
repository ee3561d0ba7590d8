"""fp16 products that accumulate in fp16, for GPUs whose fp16 rate needs it: an experiment for the P100.

A P100 multiplies fp16 at 18.7 TFLOP/s where it accumulates in fp16 and at its fp32 rate, 9.3, where it accumulates in
fp32, which is all that torch asks for: its ``allow_fp16_accumulation`` acts from compute capability 7.0 on only. So
cuBLAS is called directly, on torch's own handle and thereby on its stream. Sums of thousands of products in fp16 lose
digits; `benchmarks.teacher` measures what that costs in its row ``int8-fp16-half``. It has never run on a P100.

Source: cuBLAS library documentation, cublasGemmEx.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from daramgpt.errors import UserError

# Of cublas_api.h and library_types.h.
NO_TRANSPOSE, TRANSPOSE = 0, 1
CUDA_R_16F = 2
CUBLAS_COMPUTE_16F = 64
CUBLAS_GEMM_DEFAULT = -1
# 1 and 0 in fp16: factors have the type of the accumulator.
ONE, ZERO = ctypes.c_uint16(0x3C00), ctypes.c_uint16(0)
# handle, two transpositions, m, n, k; factor; A, type, stride; B, type, stride; factor; C, type, stride; accumulator;
# algorithm.
ARGUMENTS: list[Any] = [
    ctypes.c_void_p,
    *[ctypes.c_int] * 5,
    *[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    *[ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    *[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    *[ctypes.c_int, ctypes.c_int],
]
Gemm = Callable[..., int]


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """inputs · weightᵀ + bias in fp16, accumulated in fp16; on a GPU.

    Args:
        inputs: [..., in].
        weight: [out, in].
        bias: [out], or None.
    """
    output = inputs.new_empty(*inputs.shape[:-1], len(weight))
    # torch binds this handle to its current stream whenever it is asked for.
    multiply(_gemm(), torch.cuda.current_blas_handle(), inputs.contiguous(), weight.contiguous(), output)
    return output if bias is None else output.add_(bias)


def multiply(gemm: Gemm, handle: int, inputs: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
    """inputs [..., in] · weight [out, in]ᵀ into output [..., out], all contiguous and in fp16.

    cuBLAS counts in columns: to it a contiguous [rows, columns] is [columns, rows], so it is asked for the transpose,
    outputᵀ = weight · inputsᵀ.
    """
    assert {inputs.dtype, weight.dtype, output.dtype} == {torch.float16}
    num_outputs, num_inputs = weight.shape
    status = gemm(
        *(handle, TRANSPOSE, NO_TRANSPOSE, num_outputs, inputs.numel() // num_inputs, num_inputs),
        *(ctypes.addressof(ONE), weight.data_ptr(), CUDA_R_16F, num_inputs),
        *(inputs.data_ptr(), CUDA_R_16F, num_inputs),
        *(ctypes.addressof(ZERO), output.data_ptr(), CUDA_R_16F, num_outputs),
        *(CUBLAS_COMPUTE_16F, CUBLAS_GEMM_DEFAULT),
    )
    if status:
        raise RuntimeError(f"cublasGemmEx failed with status {status}")


def check(precision: str, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what has no such products.

    Raises:
        UserError: not int8 computed in fp16 on a GPU, or torch's cuBLAS is not found.
    """
    if precision != "int8" or compute_dtype != torch.float16 or device.type != "cuda":
        raise UserError(
            "teacher.half_accumulation: only int8 rows computed in fp16 on a GPU have such products",
            "leave it out, or use teacher.precision=int8 and a ds_config with fp16",
        )
    _gemm()


@cache
def _gemm() -> Gemm:
    """``cublasGemmEx`` of the library that torch has loaded."""
    torch.cuda.current_blas_handle()  # loads it
    paths = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcublas.so" in line]
    if not paths:
        raise UserError("teacher.half_accumulation: torch has no libcublas.so here", "leave it out")
    gemm = ctypes.CDLL(paths[0]).cublasGemmEx
    gemm.argtypes, gemm.restype = ARGUMENTS, ctypes.c_int
    return gemm
