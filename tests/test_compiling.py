"""torch.compile for the blocks: asked for where it cannot work it is refused, where it works values stay."""

from __future__ import annotations

import os

import pytest
import torch

from daramgpt import compiling, student
from daramgpt.errors import UserError
from daramgpt.recipe import Shape

SHAPE = Shape(n_embd=32, n_head=2, n_layer=2)


def gradients(device: str, is_compiled: bool) -> dict[str, torch.Tensor]:
    model = student.build(SHAPE, 50, 16, 0, seed=0).to(device)
    if is_compiled:
        compiling.compile_blocks(model)
    ids = torch.arange(32, device=device).view(2, 16)
    model.transformer(ids, use_cache=False).last_hidden_state.square().sum().backward()
    return {
        name: parameter.grad for name, parameter in model.transformer.named_parameters() if parameter.grad is not None
    }


def check_same(device: str) -> None:
    expected, found = gradients(device, False), gradients(device, True)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("DARAMGPT_COMPILE" not in os.environ, reason="compiles for half a minute; set DARAMGPT_COMPILE=1")
def test_compiled_blocks_have_the_same_gradients() -> None:
    check_same("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < compiling.CAPABILITY_FLOOR,
    reason="needs a GPU of compute capability 7.0",
)
def test_compiled_blocks_have_the_same_gradients_on_a_gpu() -> None:
    check_same("cuda")


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: object, **options: object) -> object:
        def fails(*arguments: object) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

        return fails

    monkeypatch.setattr(torch, "compile", compile)
    model = student.build(SHAPE, 50, 16, 0, seed=0)
    with pytest.raises(UserError, match=r"engine\.compile.*No working C\+\+ compiler") as caught:
        compiling.compile_blocks(model)
    assert "engine.compile=none" in caught.value.mend and "more" not in str(caught.value)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 0))
    with pytest.raises(UserError, match=r"compute capability 6\.0, below 7\.0"):
        compiling.check()
