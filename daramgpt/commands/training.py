"""Training a run: its ranks, its parts one after the other, as far as the session goes."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daramgpt import budget, hardware, trackers
from daramgpt import recipe as recipes
from daramgpt.commands import copies, initial_weights
from daramgpt.commands.parts import export_teacher, load_teacher, open_shards, parts_of, teacher_dir
from daramgpt.errors import UserError
from daramgpt.ledger import sessions
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, locked, write_atomically

if TYPE_CHECKING:
    from daramgpt.launcher import Nodes
    from daramgpt.persistence import Persister
    from daramgpt.progress import Console
    from daramgpt.train import StopRequest

# For the last copies of a session.
COPY_SECONDS = 600.0


def train_on_ranks(
    recipe: Recipe,
    run: RunDirectory,
    console: Console,
    hours: float | None,
    num_gpus: int | None,
    nodes: Nodes | None,
    allows_changes: bool = False,
) -> None:
    """Train in this process, or where the plan has several ranks, in as many that DeepSpeed's launcher starts.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        hours: as from `train`.
        num_gpus: ranks on this machine that the command line asks for; must be those of the plan.
        nodes: several machines; as from `launcher.read_nodes`.
        allows_changes: go on with other settings, as far as `recipe_changes.CHANGEABLE` goes.

    Raises:
        UserError: there is no plan or it is for other ranks, the shards are missing, a package of `report_to` is not
            installed, or a rank refused to go on.
        launcher.RankError: a rank failed.
    """
    from daramgpt import launcher, planner

    node_rank = nodes.node_rank if nodes else None
    where = f" on the first node, and share its run directory or copy it to {run.path}" if node_rank else ""
    trackers.require(recipe.report_to)
    frozen = planner.read_plan(run)
    if frozen is None:
        raise UserError(f"{run.plan} is missing", f"plan the run first{where}: python -m daramgpt plan {recipe.name}")
    world_size = frozen["world_size"]
    _check_ranks(run, world_size, num_gpus, nodes)
    if nodes is not None and not (run.shards / "index.json").is_file():
        raise UserError(f"{run.shards} holds no shards", f"prepare the run first{where}")
    with locked(run, node_rank):
        if not node_rank:
            # That of another node is not this one's to remove.
            run.stop_request.unlink(missing_ok=True)
            copies.fetch(recipe, run, console, allows_changes)
        if world_size == 1:
            train(recipe, run, console, hours, allows_changes=allows_changes)
            return
        if nodes is not None and node_rank is not None:
            console(
                f"node {node_rank} of {len(nodes.slots)}: joining {nodes.address}:{nodes.port}; "
                f"node 0 shows the progress, what goes wrong here is in {run.node_log(node_rank)}"
            )
        write_atomically(run.session_recipe(node_rank), recipes.dump(recipe))
        arguments = ["train-rank", str(run.path), "--node", str(node_rank or 0), "--session-start"]
        arguments += [str(_session_start()), *(["--hours", str(hours)] if hours is not None else [])]
        arguments += ["--allow-changes"] if allows_changes else []
        launcher.start_ranks(arguments, world_size, nodes, run, console)


def _check_ranks(run: RunDirectory, world_size: int, num_gpus: int | None, nodes: Nodes | None) -> None:
    """Refuse ranks other than those of the plan: every one of them has its share of each batch."""
    asked = nodes.num_ranks if nodes else num_gpus
    option = "--hostfile" if nodes else "--num-gpus"
    gpus = hardware.detect().gpus
    if asked is None and 0 < len(gpus) < world_size:
        asked, option = len(gpus), "this machine's GPUs"
    if asked not in (None, world_size):
        raise UserError(
            f"{run.plan} is for {world_size} ranks, {option}: {asked}",
            "plan for these ranks first: plan takes the same option, and keeps the batch and what is trained",
        )


def train(
    recipe: Recipe,
    run: RunDirectory,
    console: Console,
    hours: float | None,
    session_start: float | None = None,
    allows_changes: bool = False,
) -> str:
    """Train the run and its parts on this rank, as far as the session goes.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        hours: of this session; None = as the recipe says.
        session_start: Unix time; None = as ``launch.sh`` says, else now.
        allows_changes: as of `train_on_ranks`.

    Returns:
        ``done``, ``deadline`` or ``interrupted``.

    Raises:
        UserError: a part has no plan, the shards are missing, or what is to be trained from cannot be used.
    """
    from daramgpt.train import StopRequest

    hours = recipe.budget.session_hours if hours is None else hours
    start = _session_start() if session_start is None else session_start
    stop = StopRequest(None if hours is None else start + 3600 * hours, run.stop_request)
    stop.listen()
    persister = _persister(recipe, run, console)
    session = _Session(run, stop, console, hardware.detect().describe(), persister, allows_changes)
    try:
        return _train_parts(recipe, session)
    finally:
        if persister is not None:
            # Done or not: whoever asked for a stop waits for it.
            persister.finish(COPY_SECONDS)


@dataclass(frozen=True)
class _Session:
    """What all trainings of a run have in common in this process; `Training` has the meaning of each."""

    run: RunDirectory
    stop: StopRequest
    console: Console
    machine: str
    persister: Persister | None
    allows_changes: bool


def _persister(recipe: Recipe, run: RunDirectory, console: Console) -> Persister | None:
    """Of the first rank; None where there is nothing to copy to."""
    if os.environ.get("RANK", "0") != "0" or not (places := copies.targets(recipe)):
        return None
    from daramgpt.persistence import Persister

    return Persister(places, run, recipe.checkpoint.keep, console)


def _train_parts(recipe: Recipe, session: _Session) -> str:
    """One training after the other, until one stops before its end."""
    from daramgpt import launcher, planner

    run, console = session.run, session.console
    for label, part, part_run in parts_of(recipe, run):
        frozen = planner.read_plan(part_run)
        if frozen is None:
            raise UserError(f"{part_run.plan} is missing", f"run: python -m daramgpt plan {recipe.name}")
        reason = _train_part(label, part, part_run, planner.with_recipe(frozen, part), session)
        if reason != "done":
            console(f"{label}: stopped ({reason}); everything is saved, the same command goes on from here")
            return reason
        if label == "teacher":
            if os.environ.get("RANK", "0") == "0":
                export_teacher(part, part_run, run)
            # The others must not load it before it is there.
            launcher.check_agreement({"the teacher": "exported"}, run.log)
    return "done"


def _train_part(label: str, part: Recipe, part_run: RunDirectory, frozen: dict[str, Any], session: _Session) -> str:
    """One training; returns at once where all its steps are trained, or no hours are left."""
    from daramgpt import checkpoint, launcher

    run, console = session.run, session.console
    saved = checkpoint.newest(part_run.checkpoints, console)
    left = budget.left(part.budget, sessions(run.ledger), time.time())
    facts = {
        "settings": part.model_dump_json(
            exclude={"corpus": True, "teacher": {"model"}, "student": {"init_model"}, "engine": {"ds_config"}}
        ),
        "plan.json": json.dumps(frozen),
        "shards": initial_weights.digest(run.shards / "index.json"),
        "checkpoints": f"{saved.path.name} {saved.sha256}" if saved else "none",
        "hours left": str(left.seconds > 0),
    }
    teacher_sha256 = None
    if part.teacher is not None:
        from daramgpt import teacher

        teacher_sha256 = facts["the teacher"] = teacher.fingerprint(teacher_dir(part, run))
    launcher.check_agreement(facts, run.log)
    if saved is not None:
        end_step = budget.end_step(saved.state, frozen["num_steps"], part.budget)
        if saved.state["step"] >= end_step:
            console(f"{label}: all {end_step:,} steps are trained")
            return "done"
    if not left.seconds:
        console(f"{label}: no hours are left ({left.bound}); raise that to go on now")
        return "deadline"
    # What is not needed to find that out is imported from here on.
    from daramgpt import train

    initial = None
    # Its checkpoints know it by the recipe's own word.
    beginning = initial_weights.settled(label, part, run, console) if saved is None else part
    if saved is None and beginning.student.init != "random":
        initial = part_run.initial_weights
        # The first rank makes them.
        with launcher.waiting_for_all():
            made_from = initial_weights.ensure(label, beginning, part_run, run, session.machine, session.stop, console)
        launcher.check_agreement({"settings of the initial weights": made_from}, run.log)
        launcher.check_agreement({"the initial weights": initial_weights.digest(initial)}, run.log)
        if not initial_weights.stand(initial, made_from):
            # Whoever was asked to stop, no rank has them.
            return "interrupted"
    loaded = None
    if part.teacher is not None:
        console(f"{label}: loading the teacher")
        loaded = load_teacher(part, run, frozen)
        weights = f"{frozen['teacher_precision']}, {loaded.weight_bytes / 1e6:,.1f} MB"
        console(f"teacher: {loaded.num_parameters:,} parameters, {weights}")
    return train.train(
        train.Training(
            label,
            part,
            part_run,
            frozen,
            open_shards(run),
            loaded,
            session.stop,
            console,
            run.ledger,
            session.machine,
            session.persister,
            teacher_sha256,
            session.allows_changes,
            initial,
        )
    )


def _session_start() -> float:
    """Unix time at which the session began; ``launch.sh`` says when."""
    return float(os.environ.get("DARAMGPT_SESSION_START") or time.time())
