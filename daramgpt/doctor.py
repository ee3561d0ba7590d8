"""Whether this machine can do what a recipe asks, before hours are spent: one line a check, with what mends it.

A fault that would stop the run is ``blocked``; one that makes it slow, or may stop it later, is a ``warn``. What can
only be known by trying is tried: a product on the device, an 8-bit layer through bitsandbytes. DeepSpeed is asked for
its version only, because importing it takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from daramgpt import ds_config, hardware
from daramgpt.errors import UserError
from daramgpt.hardware import GIB, Machine
from daramgpt.recipe import Recipe, Shape
from daramgpt.run_directory import RunDirectory

PYTHON_FLOOR = (3, 11)
MEMORY_FLOOR_BYTES = 4 * GIB
# Korean text has 5.4 to 6.3 bytes a token; a shard keeps at most 4 bytes a token.
SHARD_BYTES_PER_TEXT_BYTE = 0.75
# A checkpoint keeps every parameter and AdamW's two moments, each in fp32.
CHECKPOINT_BYTES_PER_PARAMETER = 12
USUAL_VOCAB_SIZE = 51200

Status = Literal["ok", "warn", "blocked"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; `text` says what was found and, where it is not ok, what mends it."""

    name: str
    status: Status
    text: str

    @property
    def blocks(self) -> bool:
        return self.status == "blocked"

    def line(self) -> str:
        """As the doctor prints it."""
        return f"{self.status:<8} {self.name:<11} {self.text}"


def check(recipe: Recipe, run: RunDirectory, machine: Machine) -> list[Check]:
    """Everything a run of `recipe` in `run` needs, in the order in which it would be missed."""
    checks = [_python(), _memory(machine), *_packages()]
    torch_check = _torch(machine)
    checks.append(torch_check)
    if not torch_check.blocks:
        checks.append(_kernel(machine))
        checks.extend(_eight_bit(recipe, machine))
    checks.append(_ds_config(recipe, machine))
    checks.extend(_teacher(recipe, machine))
    checks.extend(_corpora(recipe))
    checks.append(_disk(recipe, run))
    return checks


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < PYTHON_FLOOR:
        floor = ".".join(map(str, PYTHON_FLOOR))
        return Check("python", "blocked", f"{version}; install Python {floor} or newer")
    return Check("python", "ok", version)


def _memory(machine: Machine) -> Check:
    if machine.memory_bytes < MEMORY_FLOOR_BYTES:
        floor = MEMORY_FLOOR_BYTES // GIB
        return Check("machine", "warn", f"{machine.describe()}; less than {floor} GiB may not do, close other programs")
    return Check("machine", "ok", machine.describe())


def _packages() -> Iterator[Check]:
    """Installed versions against the floors that the project's own metadata states; torch has a check of its own."""
    try:
        requirements = importlib.metadata.requires("daramgpt") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "warn", f"daramgpt is not installed; {_pip('-e', 'CHECKOUT')}")
        return
    found = []
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)", requirement)
        if not match or match[1] == "torch":
            continue
        name, floor = match[1], match[2]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("packages", "blocked", f"{name} is missing; {_pip(f'{name}>={floor}')}")
            continue
        if hardware.parse_version(version) < hardware.parse_version(floor):
            yield Check("packages", "blocked", f"{name} {version} is older than {floor}; {_pip(f'{name}>={floor}')}")
        found.append(f"{name} {version}")
    yield Check("packages", "ok", ", ".join(found))


def _torch(machine: Machine) -> Check:
    pin = hardware.choose(machine).torch_pin
    fault = hardware.torch_fault(machine)
    if fault is None:
        import torch

        return Check("torch", "ok", f"{torch.__version__}, has kernels for the {machine.device.replace('cuda', 'GPU')}")
    mend = _pip(f"torch=={pin}")
    if "driver" in fault:
        mend = f"update the NVIDIA driver, or {_pip(f'torch=={hardware.TORCH_PIN_OLD_GPUS}')}"
    return Check("torch", "blocked", f"{fault}; {mend}")


def _kernel(machine: Machine) -> Check:
    """A product on every device, in the precision the machine would train in, against fp32 on the CPU."""
    import torch

    name = hardware.choose(machine).dtype
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator) for _ in range(2))
    devices = [f"cuda:{index}" for index in range(len(machine.gpus))] or ["cpu"]
    for device in devices:
        try:
            product = (left.to(device, dtype) @ right.to(device, dtype)).float().cpu()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Check("kernel", "blocked", f"a product on {device} fails: {reason}; {_reinstall()}")
        error_size = ((product - left @ right).norm() / (left @ right).norm()).item()
        if not error_size < 0.02:
            return Check("kernel", "blocked", f"a {name} product on {device} is wrong; {_reinstall()}")
    return Check("kernel", "ok", f"{name} product on {', '.join(devices)}")


def _eight_bit(recipe: Recipe, machine: Machine) -> Iterator[Check]:
    """A small layer through the teacher's precision and back, where the recipe wants 8 bits."""
    import torch

    precision = _teacher_precision(recipe, machine)
    if precision not in ("int8", "llm-int8"):
        return
    try:
        from daramgpt import teacher

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 64, generator=generator)
        inputs = torch.randn(4, 64, generator=generator).to(machine.device)
        expected = inputs.cpu() @ weight.T
        layer = teacher.eight_bit_linear(weight, None, precision).to(machine.device)
        error_size = ((layer(inputs).cpu() - expected).norm() / expected.norm()).item()
    except Exception as error:  # a broken native library raises whatever it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield Check("8 bits", "blocked", f"{precision} through bitsandbytes fails: {reason}; {_reinstall()}")
        return
    if not error_size < 0.05:
        yield Check("8 bits", "blocked", f"a {precision} layer is off by {error_size:.0%}; {_reinstall()}")
    else:
        yield Check("8 bits", "ok", f"{precision} layer through bitsandbytes, off by {error_size:.1%}")


def _ds_config(recipe: Recipe, machine: Machine) -> Check:
    choices = hardware.choose(machine)
    name = recipe.engine.ds_config
    if name == "auto":
        name = choices.ds_config
    try:
        dtype = ds_config.dtype(ds_config.load(name))
    except UserError as error:
        return Check("ds_config", "blocked", str(error))
    fault = hardware.dtype_fault(machine, dtype)
    if fault:
        return Check("ds_config", "blocked", f"{name}: {fault}; use {choices.ds_config}")
    return Check("ds_config", "ok", f"{name}, {dtype}")


def _teacher(recipe: Recipe, machine: Machine) -> Iterator[Check]:
    if recipe.teacher is None:
        return
    precision = _teacher_precision(recipe, machine)
    if precision == "llm-int8" and machine.capability is not None and machine.capability < (7, 5):
        major, minor = machine.capability
        text = f"llm-int8 needs compute capability 7.5, this GPU has {major}.{minor}; --set teacher.precision=int8"
        yield Check("teacher", "blocked", text)
        return
    if precision in ("fp16", "bf16") and (fault := hardware.dtype_fault(machine, precision)):
        yield Check("teacher", "warn", f"{fault}, so it is emulated, slowly; --set teacher.precision=int8")
    model = recipe.teacher.model
    if model is None:
        yield Check("teacher", "ok", f"trained by the run, then {precision}")
        return
    folder = Path(model).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        yield Check("teacher", "ok", f"{folder}, {precision}")
    elif folder.is_dir():
        yield Check(
            "teacher", "blocked", f"teacher.model: {folder} has no config.json; give a Hugging Face model's folder"
        )
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        yield Check("teacher", "blocked", f'teacher.model: there is no folder "{model}"; correct it, or give a hub id')
    else:
        yield Check("teacher", "ok", f"{model} from the hub, {precision}")


def _corpora(recipe: Recipe) -> Iterator[Check]:
    if recipe.corpus.dir is None and recipe.reads_files():
        if recipe.corpus.made_megabytes is None:
            yield Check("corpus", "blocked", "no corpus folder is given; add --corpus DIR")
        else:
            yield Check("corpus", "ok", f"{recipe.corpus.made_megabytes:g} MB, made by the run")
        return
    from daramgpt.curriculum import find_corpora

    try:
        corpora = find_corpora(recipe, Path(recipe.corpus.dir or "").expanduser())
    except UserError as error:
        yield Check("corpus", "blocked", str(error))
        return
    found = []
    for name, corpus in corpora.items():
        num_files = len(corpus.paths)
        found.append(f"{name} {num_files} file{'s' * (num_files != 1)}" if num_files else f"{name} data set")
    yield Check("corpus", "ok", ", ".join(found))


def _disk(recipe: Recipe, run: RunDirectory) -> Check:
    folder = next(parent for parent in (run.path.absolute(), *run.path.absolute().parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check("disk", "blocked", f"{folder} cannot be written; choose another run directory with --run")
    needed, free = _needed_bytes(recipe), shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}, about {needed / GIB:.1f} GiB needed"
    if free < needed:
        return Check("disk", "blocked", f"{text}; make room, or choose another run directory with --run")
    return Check("disk", "ok", text)


def _needed_bytes(recipe: Recipe) -> float:
    """What a run writes, at most: shards, made corpora, checkpoints with one more while the next is written."""
    text_bytes = sum(stage.take for stage in recipe.curriculum.stages) * recipe.curriculum.scale
    shapes: list[Shape] = [recipe.student, *([recipe.student] if recipe.evaluation.baseline else [])]
    vocab_size = USUAL_VOCAB_SIZE
    if recipe.teacher is not None and recipe.teacher.train is not None:
        shapes.append(recipe.teacher.train)
        vocab_size = recipe.teacher.train.vocab_size
    elif recipe.teacher is not None and recipe.teacher.model is not None:
        config = Path(recipe.teacher.model).expanduser() / "config.json"
        # Without it: a hub id, or a fault that the teacher's own check names.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            vocab_size = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    positions = recipe.curriculum.context_tokens
    num_parameters = sum(
        12 * shape.n_layer * shape.n_embd**2 + (vocab_size + positions) * shape.n_embd for shape in shapes
    )
    checkpoints = num_parameters * CHECKPOINT_BYTES_PER_PARAMETER * (recipe.checkpoint.keep + 1)
    return text_bytes * SHARD_BYTES_PER_TEXT_BYTE + (recipe.corpus.made_megabytes or 0) * 1e6 * 2 + checkpoints


def _teacher_precision(recipe: Recipe, machine: Machine) -> str | None:
    if recipe.teacher is None:
        return None
    chosen = recipe.teacher.precision
    return hardware.choose(machine).teacher_precision if chosen == "auto" else chosen


def _pip(*arguments: str) -> str:
    quoted = " ".join(f'"{argument}"' if ">" in argument else argument for argument in arguments)
    return f"{sys.executable} -m pip install {quoted}"


def _reinstall() -> str:
    return "delete .venv in the checkout and run bash launch.sh again"
