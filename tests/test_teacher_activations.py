"""Activations of an 8-bit teacher: applied inside the product on a CPU, and the same function as outside."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from test_teacher import ARCHITECTURES, VOCAB
from torch import nn
from transformers import PreTrainedModel

from daramgpt import teacher
from daramgpt.teacher import activations

ONEDNN = pytest.mark.skipif(
    not activations._has_kernels(torch.float32), reason="this torch has no oneDNN products with activations"
)


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model: PreTrainedModel = ARCHITECTURES[request.param]()
    model.save_pretrained(tmp_path)
    return tmp_path


def identities(loaded: teacher.Teacher) -> int:
    return sum(isinstance(module, nn.Identity) for module in loaded.model.modules())


def hidden_states(loaded: teacher.Teacher) -> torch.Tensor:
    ids = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    return loaded.hidden_states(ids).double()


@ONEDNN
def test_the_joined_product_is_the_separate_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = teacher.load(folder, "int8")
    monkeypatch.setattr(activations, "_has_kernels", lambda dtype: False)
    separate = teacher.load(folder, "int8")
    assert (identities(joined), identities(separate)) == (2, 0)
    expected = hidden_states(separate)
    assert (hidden_states(joined) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.skipif(not activations._has_kernels(torch.bfloat16), reason="this CPU has no bf16 products of oneDNN")
def test_every_product_in_bf16_is_onednns_and_the_same_to_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = hidden_states(teacher.load(folder, "int8", torch.float32))
    joined = teacher.load(folder, "int8", torch.bfloat16)
    products = [module.product for module in joined.model.modules() if hasattr(module, "product")]
    assert products and all(isinstance(product, partial) for product in products)
    monkeypatch.setattr(activations, "_has_kernels", lambda dtype: False)
    separate = teacher.load(folder, "int8", torch.bfloat16)
    errors = [(hidden_states(loaded) - expected).norm() / expected.norm() for loaded in (joined, separate)]
    assert errors[0] < 1.1 * errors[1] < 2e-2


@ONEDNN
def test_other_precisions_keep_their_activations(folder: Path) -> None:
    assert identities(teacher.load(folder, "fp32")) == 0
    assert identities(teacher.load(folder, "llm-int8")) == 0


@ONEDNN
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.GELU(approximate="tanh"), lambda x: nn.functional.gelu(x, approximate="tanh")),
        (nn.GELU(), nn.functional.gelu),
        (nn.SiLU(), nn.functional.silu),
    ],
    ids=["gelu-tanh", "gelu", "silu"],
)
def test_a_name_of_onednn_is_the_function_of_the_module(module: nn.Module, function: object) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(5, 16, generator=generator), torch.randn(24, 16, generator=generator)
    bias = torch.randn(24, generator=generator)
    names = activations._onednn_names(module)
    assert names is not None and callable(function)
    expected = function(nn.functional.linear(inputs.double(), weight.double(), bias.double()))
    given = activations.product_with_activation(inputs, weight, bias, names)
    assert (given - expected).abs().max() < 1e-5


def test_an_unknown_activation_is_left_alone() -> None:
    assert activations._onednn_names(nn.ReLU()) is None
    assert activations._onednn_names(None) is None
