"""What the recipe and the run ask of this machine: precision, configuration, teacher, corpora, room on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from daramgpt import ds_config as ds_configs
from daramgpt import hardware, planner, trackers
from daramgpt.doctor.finding import Check
from daramgpt.errors import UserError
from daramgpt.hardware import GIB, LLM_INT8_FROM, Machine
from daramgpt.recipe import Recipe, Shape
from daramgpt.run_directory import RunDirectory

# Korean text has 5.4 to 6.3 bytes a token; a shard keeps at most 4 bytes a token.
SHARD_BYTES_PER_TEXT_BYTE = 0.75
# A checkpoint keeps every parameter and AdamW's two moments, each in fp32.
CHECKPOINT_BYTES_PER_PARAMETER = 12
USUAL_VOCAB_SIZE = 51200


def dtype(recipe: Recipe, machine: Machine) -> str:
    """Of the run's arithmetic; of the machine's own choice where the ds_config is at fault."""
    choices = hardware.choose(machine)
    name = recipe.engine.ds_config
    with contextlib.suppress(UserError):
        return ds_configs.dtype(ds_configs.load(choices.ds_config if name == "auto" else name))
    return choices.dtype


def alternatives(recipe: Recipe, run: RunDirectory, machine: Machine) -> tuple[str, ...]:
    """Precisions of which the run's teacher needs one: what its plan or the recipe says, else the plan's candidates."""
    if recipe.teacher is None:
        return ()
    # A plan at fault is refused when it is used.
    with contextlib.suppress(UserError):
        plan = planner.read_plan(run)
        if plan is not None and plan["teacher_precision"] is not None:
            return (plan["teacher_precision"],)
    if recipe.teacher.precision != "auto":
        return (recipe.teacher.precision,)
    return hardware.teacher_candidates(machine, dtype(recipe, machine))


def ds_config(recipe: Recipe, machine: Machine) -> Check:
    """Whether the configuration can be read, and the machine has its precision."""
    choices = hardware.choose(machine)
    name = recipe.engine.ds_config
    if name == "auto":
        name = choices.ds_config
    try:
        kind = ds_configs.dtype(ds_configs.load(name))
    except UserError as error:
        return Check("ds_config", "blocked", str(error))
    fault = hardware.dtype_fault(machine, kind)
    if fault:
        return Check("ds_config", "blocked", f"{name}: {fault}; use {choices.ds_config}")
    return Check("ds_config", "ok", f"{name}, {kind}")


def teacher(recipe: Recipe, run: RunDirectory, machine: Machine) -> Iterator[Check]:
    """Whether the machine has the teacher's precision, and there is a model where the recipe says; none is loaded."""
    if recipe.teacher is None:
        return
    choice = alternatives(recipe, run, machine)
    precision = choice[0] if len(choice) == 1 else f"the best of {', '.join(choice)}, which plan measures"
    if precision == "llm-int8" and machine.capability is not None and machine.capability < LLM_INT8_FROM:
        needed, found = (".".join(map(str, capability)) for capability in (LLM_INT8_FROM, machine.capability))
        text = f"llm-int8 needs compute capability {needed}, this GPU has {found}; --set teacher.precision=int8"
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


def initialisation(recipe: Recipe) -> Iterator[Check]:
    """Whether the student can have the weights that it is to begin with, by the models' configurations alone."""
    if recipe.student.init == "random":
        return
    from daramgpt import initialisation

    try:
        yield Check("student", "ok", f"begins with {initialisation.check_recipe(recipe)}")
    except UserError as error:
        yield Check("student", "blocked", str(error))


def reporting(recipe: Recipe) -> Iterator[Check]:
    """Whether what metrics are sent to is installed, where anything is."""
    if not recipe.report_to:
        return
    try:
        trackers.require(recipe.report_to)
    except UserError as error:
        yield Check("report_to", "blocked", str(error).removeprefix("report_to: "))
    else:
        yield Check("report_to", "ok", ", ".join(recipe.report_to))


def corpora(recipe: Recipe) -> Iterator[Check]:
    """Whether every corpus of the recipe is there."""
    if recipe.corpus.dir is None and recipe.reads_files():
        if recipe.corpus.made_megabytes is None:
            yield Check("corpus", "blocked", "no corpus folder is given; add --corpus DIR")
        else:
            yield Check("corpus", "ok", f"{recipe.corpus.made_megabytes:g} MB, made by the run")
        return
    from daramgpt.curriculum import find_corpora

    try:
        known = find_corpora(recipe, Path(recipe.corpus.dir or "").expanduser())
    except UserError as error:
        yield Check("corpus", "blocked", str(error))
        return
    found = []
    for name, corpus in known.items():
        num_files = len(corpus.paths)
        found.append(f"{name} {num_files} file{'s' * (num_files != 1)}" if num_files else f"{name} data set")
    yield Check("corpus", "ok", ", ".join(found))


def disk(recipe: Recipe, run: RunDirectory) -> Check:
    """Whether the run directory can be written, and has room for all of the run."""
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
