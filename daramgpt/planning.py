"""What ``plan`` does with a run: choose for each of its trainings, predict, probe where that pays, freeze.

The parent only measures the machine and does arithmetic; whatever trains, trains in a process of its own
(`try_candidate`), because a candidate may die of memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import compiling, ds_config, gpu_table, hardware, planner
from daramgpt import recipe as recipes
from daramgpt.errors import UserError
from daramgpt.planner import probe
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from daramgpt.shards import Shards


@dataclass(frozen=True)
class Part:
    """One training of a run.

    Attributes:
        label: for people.
        recipe, run: of this training.
        teacher_dir: of its teacher; None where it has none. The directory may not be there yet.
        old: the plan that is to be replaced: its batch, its steps and where possible its teacher's precision stay.
        changes: why it is.
    """

    label: str
    recipe: Recipe
    run: RunDirectory
    teacher_dir: Path | None
    old: dict[str, Any] | None = None
    changes: tuple[str, ...] = ()


def changes(plan: dict[str, Any], recipe: Recipe, machine: hardware.Machine, world_size: int) -> tuple[str, ...]:
    """What has changed since a plan was made, as ``"what: old → new"``; without a change it stays.

    Args:
        plan: of a training.
        recipe: of the training.
        machine: this one.
        world_size: ranks that are to train.
    """
    old, new = plan.get("made_for"), _made_for(recipe, machine)
    found = [("ranks", plan["world_size"], world_size)]
    if isinstance(old, dict):
        found += [(key, old.get(key), value) for key, value in new.items()]
    return tuple(f"{key}: {before} → {now}" for key, before, now in found if before != now)


def _made_for(recipe: Recipe, machine: hardware.Machine) -> dict[str, Any]:
    """What a plan depends on that may be another one in the next session."""
    engine = recipe.engine
    return {
        "device": machine.kind,
        "ds_config": engine.ds_config,
        "micro_batch_rows": engine.micro_batch_rows,
        "loss_chunk_tokens": engine.loss_chunk_tokens,
        "activation_checkpointing": engine.activation_checkpointing,
    }


def make_plans(
    parts: list[Part],
    whole: Recipe,
    run: RunDirectory,
    shards: Shards,
    vocab_size: int,
    world_size: int,
    ranks_here: int,
    say: Callable[[str], None],
) -> None:
    """Freeze the plan of each part.

    Args:
        parts: that have none yet, or one that is to be replaced.
        whole, run: of which they are parts.
        shards: of the run.
        vocab_size: of all models.
        world_size, ranks_here: of all machines, and of this one.
        say: takes lines for people.

    Raises:
        UserError: this machine cannot do what the recipe says, or has not the memory.
    """
    import torch

    machine = hardware.detect()
    chosen = hardware.choose(machine)
    reasons = dict(chosen.reasons)
    config_name = chosen.ds_config
    if whole.engine.ds_config != "auto":
        config_name, reasons["ds_config"] = whole.engine.ds_config, "the recipe or the command line says so"
    dtype = ds_config.dtype(ds_config.load(config_name))
    if dtype != chosen.dtype:
        reasons["dtype"] = "the ds_config says so"
        if fault := hardware.dtype_fault(machine, dtype):
            reason = chosen.reasons["ds_config"]
            raise UserError(f"ds_config {config_name}: {fault}", f"use {chosen.ds_config} ({reason})")
    if whole.engine.compile != "none":
        compiling.check()
    device = torch.device("cuda" if machine.gpus and torch.cuda.is_available() else "cpu")
    num_threads = max(1, machine.num_cores // ranks_here)
    torch.set_num_threads(num_threads)
    say("timing this machine: matrix products")
    rate = planner.gemm_rate(dtype, (1024, 2048) if device.type == "cpu" else (4096, 8192), device)
    for part in parts:
        if part.old is not None:
            tokens = part.old["batch_rows"] * part.old["context_tokens"]
            optimizer = part.recipe.optimizer.model_copy(update={"batch_tokens": tokens})
            part = replace(part, recipe=part.recipe.model_copy(update={"optimizer": optimizer}))
        setup = planner.TrainingSetup(
            context_tokens=shards.context_tokens,
            vocab_size=vocab_size,
            teacher=_teacher_shape(part, vocab_size, shards.context_tokens),
            world_size=world_size,
            dtype=dtype,
            ds_config=config_name,
            device=machine.device,
        )
        rates = _rates(part, machine, device, say)
        precision = chosen.teacher_precision
        if part.recipe.teacher is not None:
            if part.recipe.teacher.precision != "auto":
                precision = part.recipe.teacher.precision
                reasons["teacher_precision"] = "the recipe or the command line says so"
            elif part.old is not None and part.old["teacher_precision"] in hardware.teacher_candidates(machine, dtype):
                precision, reasons["teacher_precision"] = part.old["teacher_precision"], "as in the plan before"
            else:
                precision, reasons["teacher_precision"] = planner.choose_teacher_precision(part.recipe, machine, setup)
        with tempfile.TemporaryDirectory(prefix="daramgpt-plan-") as scratch:
            # The run has no plan before it is final.
            plan = planner.make_plan(
                part.recipe,
                RunDirectory(Path(scratch)),
                setup,
                teacher_precision=precision,
                num_rows=shards.num_rows,
                num_threads=num_threads,
                memory_limit_bytes=machine.gpu_memory_bytes or machine.memory_bytes // ranks_here,
                flops_per_second=rate,
                reasons=reasons,
                rates=rates,
            )
        probed = _probed(plan, part, whole, run, machine.device, say)
        if probed["micro_batch_rows"] != plan["micro_batch_rows"]:
            probed = planner.predicted_anew(probed, part.recipe, setup, shards.num_rows, rates)
        probed["made_for"] = _made_for(part.recipe, machine)
        if part.old is not None:
            probed = _in_place_of(part.old, probed, part)
        write_json(part.run.plan, probed)


def _in_place_of(old: dict[str, Any], new: dict[str, Any], part: Part) -> dict[str, Any]:
    """The new plan, with a record of the old one.

    Raises:
        UserError: its ranks and rows cannot share the batch that the run was begun with.
    """
    if (new["batch_rows"], new["num_steps"]) != (old["batch_rows"], old["num_steps"]):
        rows = f", {new['micro_batch_rows']} rows a forward pass" if part.recipe.engine.micro_batch_rows else ""
        raise UserError(
            f"{part.run.plan}: its batch of {old['batch_rows']} rows a step is not to be shared by "
            f"{new['world_size']} ranks{rows}",
            "give a --num-gpus (and engine.micro_batch_rows) that divides it",
        )
    record = {"time": round(time.time()), "changes": list(part.changes)}
    return {**new, "replaced": [*old.get("replaced", []), record]}


def _rates(part: Part, machine: hardware.Machine, device: torch.device, say: Callable[[str], None]) -> planner.RatesOf:
    """Timed on the device; by its data sheet where that is a GPU that torch does not see."""
    key = gpu_table.table_key(machine.gpus[0].name) if machine.gpus and device.type == "cpu" else None
    teacher = part.recipe.teacher
    if key is None:
        say(f"timing this machine: {part.label}")
        return partial(planner.measure, recipe=part.recipe, device=device)
    half_accumulation = teacher is not None and teacher.half_accumulation
    return lambda step: planner.of_gpu(key, step.dtype, half_accumulation)


def _teacher_shape(part: Part, vocab_size: int, context_tokens: int) -> planner.ModelShape | None:
    """Of the teacher of a training, which may be one that the run trains first."""
    if part.recipe.teacher is None:
        return None
    if part.recipe.teacher.train is not None:
        return planner.recipe_shape(part.recipe.teacher.train, vocab_size, context_tokens)
    assert part.teacher_dir is not None
    return planner.teacher_shape(part.teacher_dir)


def vocab_size(teacher_dir: Path | None, shards: Shards) -> int:
    """Of all models: an embedding may have more rows than the tokenizer has tokens, and the student learns its logits.

    Args:
        teacher_dir: of a teacher that is loaded; None where the run trains it.
        shards: of the run.

    Raises:
        UserError: the tokenizer is not the teacher's.
    """
    if teacher_dir is None:
        return shards.vocab_size
    rows = planner.teacher_shape(teacher_dir).vocab_size
    if rows < shards.vocab_size:
        raise UserError(
            f"teacher.model: its tokenizer has {shards.vocab_size} tokens, its embedding {rows} rows",
            "give a model with the tokenizer it was trained with",
        )
    return rows


def _probed(
    plan: dict[str, Any], part: Part, whole: Recipe, run: RunDirectory, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The plan with the fastest micro-batch that fits, or with the reason why none was tried."""
    reason = probe.reason_not_to(
        part.recipe.engine.probe,
        plan["predicted"]["hours"],
        part.recipe.engine.micro_batch_rows is not None,
        part.recipe.teacher is not None and part.recipe.teacher.train is not None,
    )
    if reason is not None:
        return {**plan, "probe": {"reason": reason}}
    rows_a_rank = plan["batch_rows"] // plan["world_size"]
    fitting = [rows for rows in range(1, plan["predicted"]["largest_micro_batch_rows"] + 1) if rows_a_rank % rows == 0]
    rows = probe.candidates(fitting, plan["context_tokens"], device)
    say(f"{part.label}: trying {', '.join(map(str, rows))} rows a forward pass, each in a process of its own")
    from daramgpt.engine import without_rank

    own_rank = without_rank(os.environ)
    with tempfile.TemporaryDirectory(prefix="daramgpt-probe-") as scratch:
        folder = Path(scratch)
        (folder / "recipe.toml").write_text(recipes.dump(whole), encoding="utf-8")

        def try_rows(candidate: int) -> probe.Trial:
            # One rank, and of each candidate the tokens a step that the largest has in two passes.
            passes = max(1, 2 * rows[0] // candidate)
            alone = {**plan, "world_size": 1, "batch_rows": candidate * passes}
            alone = planner.with_micro_batch(alone, candidate)
            job = {"run": str(run.path), "label": part.label, "plan": alone}
            write_json(folder / "job.json", job)
            return probe.try_in_subprocess(["probe-candidate", str(folder)], alone, own_rank, run.log)

        found = probe.probe(rows, try_rows, say)
    total_tokens = plan["predicted"]["hours"] * plan["predicted"]["tokens_per_second"]
    for trial in found["trials"]:
        # Of all ranks together, as if they never waited for each other.
        speed = trial["tokens_per_second"]
        trial["hours"] = total_tokens / (speed * plan["world_size"]) if speed else None
    if found["fastest_rows"] is None:
        found["reason"] = "no candidate got through; the micro-batch is that of the arithmetic"
        return {**plan, "probe": found}
    return {**planner.with_micro_batch(plan, found["fastest_rows"]), "probe": found}


def try_candidate(
    recipe: Recipe, scratch: RunDirectory, shards: Shards, plan: dict[str, Any], teacher: Any
) -> dict[str, Any]:
    """Train a few steps and measure; what a candidate's process answers.

    Args:
        recipe: of the training.
        scratch: takes logs; nothing of the run is written.
        shards: of the run.
        plan: with the candidate's micro-batch, for one rank.
        teacher: as from `teacher.load`, or None.

    Returns:
        ``tokens_per_second`` and ``peak_memory_bytes``, or ``fault``.
    """
    import contextlib

    import torch

    from daramgpt.shards import Feed
    from daramgpt.train import build_distiller, peak_memory_bytes
    from daramgpt.train.out_of_memory import is_out_of_memory

    torch.set_num_threads(plan["num_threads"])
    feed = Feed(
        shards,
        plan["batch_rows"],
        plan["micro_batch_rows"],
        0,
        1,
        recipe.curriculum.passes,
        recipe.seed,
        recipe.curriculum.order,
    )
    tokens = plan["batch_rows"] * plan["context_tokens"]
    best, begin = float("inf"), 0.0
    try:
        with contextlib.closing(build_distiller(recipe, scratch, shards, plan, teacher, None)) as distiller:
            for step in range(probe.MOST_STEPS + 1):
                start = time.perf_counter()
                batches = (feed.batch(step % feed.num_steps, micro) for micro in range(feed.micro_batches))
                # Waits for the device: it gives numbers.
                distiller.step(batches, feed.num_targets(step % feed.num_steps), 0.0)
                if step:
                    best = min(best, time.perf_counter() - start)
                    if time.perf_counter() - begin > probe.STEP_SECONDS:
                        break
                else:
                    # The first warms up.
                    begin = time.perf_counter()
            return {"tokens_per_second": tokens / best, "peak_memory_bytes": peak_memory_bytes()}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"fault": probe.OUT_OF_MEMORY}


def forecast(recipe: Recipe, names: list[str], teacher_dir: Path, shards: Shards | None) -> list[str]:
    """Lines on GPUs that are not at hand: a table of several, all the arithmetic of a single one.

    Args:
        recipe: of the run.
        names: such as ``"T4 x 2"``; none = the whole table.
        teacher_dir: whose config gives the teacher's shape.
        shards: give the number of tokens; without them it follows from the sizes of the stages.
    """
    shape = planner.teacher_shape(teacher_dir)
    context_tokens = min(recipe.curriculum.context_tokens, shape.num_positions)
    total_tokens = planner.curriculum_tokens(recipe)
    if shards is not None:
        total_tokens = shards.num_rows * shards.context_tokens * recipe.curriculum.passes
    found = [planner.forecast(recipe, name, shape, context_tokens, total_tokens) for name in names or planner.names()]
    return planner.one_gpu(found[0], total_tokens) if len(names) == 1 else planner.gpu_table(found)
