"""The student has the shape asked for, a tied head, and weights that are a function of its seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daramgpt import student
from daramgpt.attention import Documents
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


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_activations_give_the_same_gradients_from_fewer_bytes(masked: bool) -> None:
    ids = torch.arange(64).view(2, 32)
    inputs = Documents(ids, 7).model_inputs(torch.float32) if masked else {}
    found = []
    for is_checkpointed in (False, True):
        model = student.build(SHAPE, 321, 40, 5, seed=0).train()
        if is_checkpointed:
            student.checkpoint_activations(model)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.transformer(ids, use_cache=False, **inputs).last_hidden_state
        activations = sum(size for address, size in kept.items() if address not in weights)
        hidden.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.transformer.named_parameters()}
        found.append((hidden.detach(), gradients, activations))
    (plain, expected, all_bytes), (checkpointed, gradients, few_bytes) = found
    assert torch.equal(checkpointed, plain)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, expected[name]), name
    # A block keeps its input and no more: the mask of a document is one for all of them.
    assert few_bytes < all_bytes / 3


def test_the_global_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    student.build(SHAPE, 321, 40, 5, seed=0)
    assert torch.equal(torch.rand(5), expected)


def test_saving_says_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from daramgpt import student; from daramgpt.recipe import Shape; "
        "student.save(student.build(Shape(n_embd=8, n_head=2, n_layer=1), 20, 8, 0, 0), Path(sys.argv[1]))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=plain, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
