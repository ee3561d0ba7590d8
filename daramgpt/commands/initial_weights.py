"""The weights that a student begins with, where they are not random: made once, kept beside its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from daramgpt.commands.parts import open_shards, teacher_dir
from daramgpt.ledger import Ledger
from daramgpt.progress import Console
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, write_atomically

# Held-out tokens a stage on which a student is measured before any training.
MEASURED_TOKENS = 8192
_MADE_FROM = "made_from"


def ensure(label: str, part: Recipe, part_run: RunDirectory, run: RunDirectory, console: Console) -> str:
    """Make the initial weights where they are not there yet, on the first rank.

    Args:
        label: of the training, for the ledger.
        part, part_run: the training whose student it is.
        run: the whole run, for shards, teacher and ledger.
        console: for lines.

    Returns:
        What they were made from; empty where the student begins at random.

    Raises:
        UserError: the student cannot be projected from this teacher.
    """
    if part.student.init == "random":
        return ""
    import torch

    from daramgpt import teacher

    facts = [part.student.model_dump(), part.seed, teacher.fingerprint(teacher_dir(part, run)), open_shards(run).sha256]
    made_from = json.dumps(facts, sort_keys=True)
    if os.environ.get("RANK", "0") == "0" and _made_from(part_run.initial_weights) != made_from:
        _make(label, part, part_run, run, made_from, console)
        if torch.cuda.is_available():
            # The training is to have all of the GPU.
            torch.cuda.empty_cache()
    return made_from


def digest(path: Path) -> str:
    """sha256 of a file; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _made_from(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_MADE_FROM)
    except (OSError, SafetensorError):
        return None


def _make(
    label: str, part: Recipe, part_run: RunDirectory, run: RunDirectory, made_from: str, console: Console
) -> None:
    import torch
    from safetensors.torch import save

    from daramgpt import initialisation, student, teacher
    from daramgpt.evaluation.held_out import CausalModel, measure

    began, shards = time.monotonic(), open_shards(run)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    loaded: Any = teacher.load(teacher_dir(part, run), "fp32", device=device, cache_dir=run.teacher_weights).model
    initialisation.check(loaded.config, part.student)
    model: Any = student.build(
        part.student, loaded.config.vocab_size, shards.context_tokens, shards.eos_token_id, part.seed
    )
    model.to(device).eval()

    def bits_per_byte() -> float | None:
        stages = [stage.name for stage in shards.stages]
        return measure(CausalModel(model), shards, stages, MEASURED_TOKENS).bits_per_byte["all"]

    at_random = bits_per_byte()
    rows = initialisation.calibration_rows(shards, part.student.calibration_tokens, part.seed)
    console(f"{label}: projecting the teacher onto it, by {rows.numel():,} tokens of the curriculum")
    initialisation.project(loaded, model, rows.to(device), lambda line: console(f"  {line}"))
    projected, seconds = bits_per_byte(), round(time.monotonic() - began, 1)
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    write_atomically(part_run.initial_weights, save(weights, {_MADE_FROM: made_from}))
    if at_random is not None and projected is not None:
        console(
            f"{label}: {projected:.3f} bits per byte on held-out text before any training (random weights "
            f"{at_random:.3f}), in {seconds:,.0f} s"
        )
    Ledger(run.ledger).note(
        what=f"{label}: projected from the teacher",
        seconds=seconds,
        bits_per_byte=projected,
        random_bits_per_byte=at_random,
    )
