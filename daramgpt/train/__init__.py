"""Training: an engine with the state of the newest checkpoint, and the loop over its steps until a reason to stop.

`loop` is a session's steps, `position` what they move, `schedule` the learning rate, `session` what asks them to stop.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import torch

from daramgpt import checkpoint, compiling, ds_config, student
from daramgpt.engine import PROJECTIONS, Distiller, LossScaleFloorError
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger
from daramgpt.progress import Console
from daramgpt.recipe import Recipe
from daramgpt.recipe_changes import changes, refuse, settings_that_matter
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Feed, Shards
from daramgpt.teacher import Teacher
from daramgpt.train.loop import Loop, peak_memory_bytes
from daramgpt.train.out_of_memory import StepOutOfMemoryError, with_less_memory
from daramgpt.train.position import Position
from daramgpt.train.schedule import Horizon, first_horizon, learning_rate
from daramgpt.train.session import Clock, StopRequest
from daramgpt.train.training import Training

__all__ = [
    "Clock",
    "Horizon",
    "Position",
    "StopRequest",
    "Training",
    "build_distiller",
    "learning_rate",
    "peak_memory_bytes",
    "train",
]

# As from `Distiller.gather`.
_Tensors = dict[str, dict[str, torch.Tensor]]
# Steps of a run that may be left out because fp16 cannot hold what their rows give.
MOST_PASSED_OVER = 3


def train(training: Training) -> str:
    """Train to the end of the curriculum, or until asked to stop; goes on from the newest checkpoint.

    Returns:
        ``done``, ``deadline`` or ``interrupted``; a checkpoint of the last step stands in each case.

    Raises:
        UserError: the loss is not finite, fp16 cannot hold the gradients of too many steps, no checkpoint verifies, the
            newest was trained with other settings, shards or another teacher, the disk is full, DeepSpeed refuses its
            config, the teacher cannot be shown documents one by one, not even one row fits the memory, or this rank
            ran out of it where others wait: then its line begins with `checkpoint.START_AGAIN`.
    """
    recipe, run, shards, console = training.recipe, training.run, training.shards, training.console
    teacher, label = training.teacher, training.label
    torch.set_num_threads(training.plan["num_threads"])
    torch.manual_seed(recipe.seed)
    if recipe.engine.compile != "none":
        compiling.check()
    if recipe.engine.compile == "all" and teacher is not None:
        compiling.compile_blocks(teacher.model)
    passed_over: list[int] = []
    while True:
        plan = training.plan
        position, tensors, loss_scaler = _newest(training)
        begun_with = tensors["weights"] if tensors is not None else _initial_weights(training)
        distiller = build_distiller(recipe, run, shards, plan, teacher, begun_with)
        if tensors is not None:
            distiller.restore(tensors, position.optimizer_steps, loss_scaler)
        # Three times the weights are not to lie there for hours.
        tensors = begun_with = None
        feed = Feed(
            shards,
            plan["batch_rows"],
            plan["micro_batch_rows"],
            distiller.rank,
            distiller.world_size,
            recipe.curriculum.passes,
            recipe.seed,
            recipe.curriculum.order,
        )
        assert feed.num_steps == plan["num_steps"], "the plan was made for these shards"
        with contextlib.closing(distiller):
            if not distiller.is_same_on_all_ranks(position.step):
                raise UserError(
                    f"{run.checkpoints}: the newest checkpoint, here of step {position.step}, is not the same on "
                    "every node",
                    "share one run directory between the nodes, or copy the first node's to the others",
                )
            position.passed_over = sorted({*position.passed_over, *passed_over})
            loop = Loop(training, feed, distiller, position)
            try:
                return loop()
            except StepOutOfMemoryError as error:
                training = replace(training, plan=with_less_memory(plan, run, console, label, error))
            except LossScaleFloorError as error:
                passed_over = _without_step(position, error, console, label)
                if distiller.is_first:
                    note = Ledger(training.ledger).note
                    note(what=f"{label}: rows passed over", step=position.step + 1, cause=str(error))


def _without_step(position: Position, error: LossScaleFloorError, console: Console, label: str) -> list[int]:
    """Steps to pass over from the newest checkpoint on, with the one that could not be trained.

    Raises:
        UserError: they are too many to be the fault of their rows.
    """
    mend = "lower optimizer.learning_rate in a new run, or fp16.min_loss_scale in the ds_config"
    if error.is_fixed:
        raise UserError(f"{label}: step {position.step + 1}: {error}", "set fp16.loss_scale to 0, for a dynamic one")
    if len(position.passed_over) >= MOST_PASSED_OVER:
        numbers = ", ".join(str(step + 1) for step in position.passed_over)
        raise UserError(f"{label}: step {position.step + 1}: {error}; steps {numbers} were passed over before it", mend)
    console(f"{label}: step {position.step + 1}: {error}; goes back to the newest checkpoint and passes over its rows")
    return [*position.passed_over, position.step]


def _newest(training: Training) -> tuple[Position, _Tensors | None, dict[str, Any]]:
    """Position, tensors and loss scaler of the newest checkpoint; those of a beginning where there is none.

    Raises:
        UserError: there are checkpoints and none verifies, or the newest was trained with other settings or shards, or
            by another teacher.
    """
    recipe, plan, label = training.recipe, training.plan, training.label
    saved = checkpoint.newest(training.run.checkpoints, training.console)
    if saved is None:
        return Position(first_horizon(plan, recipe.budget.budget_hours)), None, {}
    old, new = saved.state.get("settings", {}), settings_that_matter(recipe)
    # A setting that a newer version has added is none that anybody changed.
    both = old.keys() & new.keys()
    changed = changes({key: old[key] for key in both}, {key: new[key] for key in both})
    refuse(changed, f"{saved.path}: trained with", training.allows_changes)
    if changed:
        said = [str(change) for change in changed]
        training.console(f"{label}: goes on with other settings: {'; '.join(said)}")
        if os.environ.get("RANK", "0") == "0":
            Ledger(training.ledger).note(what=f"{label}: other settings", step=saved.state["step"], changes=said)
    if saved.state.get("shards_sha256", training.shards.sha256) != training.shards.sha256:
        raise UserError(
            f"{saved.path}: trained on other shards than those in {training.shards.path}",
            "prepare them from the same corpora with the same version, or give another --run",
        )
    if saved.state.get("teacher_sha256", training.teacher_sha256) != training.teacher_sha256:
        raise UserError(
            f"{saved.path}: trained by another teacher than the one in teacher.model",
            "give the same model, in the same files, or another --run",
        )
    training.console(f"{label}: goes on from step {saved.state['step']:,} of {plan['num_steps']:,} ({saved.path.name})")
    tensors = {name: saved.tensors(name) for name in checkpoint.TENSOR_FILES}
    return Position.read(saved.state, plan["num_steps"]), tensors, saved.state["loss_scaler"]


def _initial_weights(training: Training) -> dict[str, torch.Tensor] | None:
    """What a student without a checkpoint begins with; None = random weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = training.initial_weights
    if path is None:
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: {error}", "share one run directory between the nodes, or copy the first node's to the others"
        ) from None


def build_distiller(
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    plan: dict[str, Any],
    teacher: Teacher | None,
    weights: dict[str, torch.Tensor] | None,
) -> Distiller:
    """A student with its optimizer, as a run of this plan trains it.

    Args:
        recipe, run, shards, plan, teacher: as of `train`.
        weights: what the student begins with, by transformers' names; None = random ones.

    Raises:
        UserError: DeepSpeed refuses its config, the teacher cannot be shown documents one by one, or has no such blocks
            as the loss compares.
    """
    model = student.build(
        recipe.student, plan["student"]["vocab_size"], shards.context_tokens, shards.eos_token_id, recipe.seed
    )
    if weights is not None:
        # What is trained along is none of the student's.
        own = {name: value for name, value in weights.items() if not name.startswith(PROJECTIONS)}
        found = model.load_state_dict(own, strict=False)
        # The head is the embedding, under another name.
        assert set(found.missing_keys) <= {"lm_head.weight"} and not found.unexpected_keys, found
    if recipe.engine.compile == "all":
        compiling.compile_blocks(model)
    if recipe.engine.activation_checkpointing:
        student.checkpoint_activations(model)
    document_start_id = None
    if recipe.curriculum.attention == "document":
        document_start_id = shards.eos_token_id
        if teacher is not None:
            teacher.check_documents(shards.context_tokens)
    return Distiller(
        model,
        recipe.loss,
        recipe.optimizer,
        ds_config.load(plan["ds_config"]),
        plan["micro_batch_rows"],
        plan["batch_rows"] // (plan["micro_batch_rows"] * plan["world_size"]),
        plan["loss_chunk_tokens"],
        teacher,
        run.log,
        document_start_id,
        recipe.engine.compile != "none",
        recipe.seed,
        weights,
    )
