"""What a session of a training is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daramgpt.persistence import Persister
from daramgpt.progress import Console
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Shards
from daramgpt.teacher import Teacher
from daramgpt.train.session import StopRequest


@dataclass(frozen=True)
class Training:
    """A training and what it needs in this process.

    Attributes:
        label: what is trained, for people and the ledger.
        recipe, run, plan: of this training, which may be a part of a run.
        shards: of the run.
        teacher: None trains by plain cross-entropy.
        stop: when to stop before the end.
        console: for lines; its log takes what libraries print.
        ledger: of the whole run, whose hours its parts share.
        machine: name for the ledger.
        persister: gets each checkpoint; None where there is none, and on ranks other than the first.
        teacher_sha256: as from `teacher.fingerprint`; a checkpoint that has another one is not gone on from.
        allows_changes: go on from a checkpoint of other settings, as far as `recipe.CHANGEABLE` goes.
        initial_weights: safetensors by transformers' names that the student begins with; None = random ones.
    """

    label: str
    recipe: Recipe
    run: RunDirectory
    plan: dict[str, Any]
    shards: Shards
    teacher: Teacher | None
    stop: StopRequest
    console: Console
    ledger: Path
    machine: str
    persister: Persister | None = None
    teacher_sha256: str | None = None
    allows_changes: bool = False
    initial_weights: Path | None = None
