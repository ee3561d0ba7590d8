"""The student has the shape asked for, a tied head, and weights that are a function of its seed."""

from __future__ import annotations

import pytest
import torch

from daramgpt import student
from daramgpt.recipe import Shape

SHAPE = Shape(n_embd=48, n_head=3, n_layer=2)


def test_shape_and_tied_head() -> None:
    model = student.build(SHAPE, 321, 40, 5, seed=0)
    assert model.transformer.wte.weight.shape == (321, 48)
    assert model.transformer.wpe.weight.shape == (40, 48)
    assert len(model.transformer.h) == 2 and model.transformer.h[0].attn.num_heads == 3
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.bias is None
    assert model.config.eos_token_id == model.config.bos_token_id == 5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.tensor([[0, 320]])).logits.shape == (1, 2, 321)


def test_nothing_is_dropped_out() -> None:
    model = student.build(SHAPE, 321, 40, 5, seed=0).train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_decides_the_weights_and_nothing_else_does(seed: int) -> None:
    torch.manual_seed(1)
    first = student.build(SHAPE, 321, 40, 5, seed).state_dict()
    torch.manual_seed(2)
    again = student.build(SHAPE, 321, 40, 5, seed).state_dict()
    other = student.build(SHAPE, 321, 40, 5, seed + 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_the_global_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    student.build(SHAPE, 321, 40, 5, seed=0)
    assert torch.equal(torch.rand(5), expected)
