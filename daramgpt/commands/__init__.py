"""What each command does with a run: the order of the steps, and how its parts hang together.

A run whose recipe trains its own teacher has a part ``parts/teacher``, trained first; one that compares with the same
student without a teacher has ``parts/baseline``, trained last. Parts share the shards of the run. Heavy imports are
inside the functions, so that each command pays only for what it uses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import hardware
from daramgpt import recipe as recipes
from daramgpt.commands import copies
from daramgpt.commands.generation import generate
from daramgpt.commands.parts import load_teacher, open_shards, parts_of, teacher_dir
from daramgpt.commands.resolution import resolve, run_directory
from daramgpt.commands.training import train, train_on_ranks
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, locked, write_atomically, write_json

if TYPE_CHECKING:
    from daramgpt.launcher import Nodes
    from daramgpt.progress import Console

__all__ = [
    "doctor",
    "forecast",
    "generate",
    "plan",
    "prepare",
    "probe_candidate",
    "resolve",
    "run_directory",
    "train",
    "train_on_ranks",
]

# Text that a tokenizer is trained from.
TOKENIZER_TEXT_BYTES = 3_000_000


def doctor(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    """Check the machine and what the recipe names.

    Raises:
        UserError: something blocks the run; names all of it.
    """
    from daramgpt import doctor as checks

    found = checks.check(recipe, run, hardware.detect())
    for check in found:
        console(check.line())
    if blocked := [f"{check.name}: {check.text}" for check in found if check.blocks]:
        raise UserError(f"the run cannot begin: {'; '.join(blocked)}", "mend that and run the same command again")


def prepare(
    recipe: Recipe, run: RunDirectory, console: Console, estimate_only: bool = False, allows_changes: bool = False
) -> None:
    """Corpus → tokenizer → token shards; or, of the shards, only what they would take."""
    from daramgpt import shards

    with locked(run):
        if not estimate_only:
            copies.fetch(recipe, run, console, allows_changes)
            write_atomically(run.recipe, recipes.dump(recipe))
        _make_corpus(recipe, run, console)
        assert recipe.teacher is not None
        if recipe.teacher.model:
            tokenizer_dir = teacher_dir(recipe, run)
            context_tokens = _context_tokens(recipe, tokenizer_dir, console)
        else:
            tokenizer_dir = _train_tokenizer(recipe, run, console)
            context_tokens = recipe.curriculum.context_tokens
        do = shards.estimate_stages if estimate_only else shards.prepare
        do(recipe, run, tokenizer_dir, context_tokens, console)


def _make_corpus(recipe: Recipe, run: RunDirectory, console: Console) -> None:
    if recipe.corpus.dir is not None:
        if not Path(recipe.corpus.dir).is_dir():
            raise UserError(f"--corpus: there is no folder {recipe.corpus.dir}", "give the folder of your corpora")
        return
    if not recipe.reads_files():
        return
    if recipe.corpus.made_megabytes is None:
        raise UserError(f"recipe {recipe.name} reads corpora, and no folder is given", "add --corpus DIR")
    from daramgpt import quickstart

    sizes = quickstart.write_corpus(run.corpora, recipe.corpus.made_megabytes, recipe.seed)
    console(
        f"corpus: {sum(sizes.values()) / 1e6:.1f} MB of text made by a grammar in {run.corpora} ("
        + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
        + ")"
    )


def _context_tokens(recipe: Recipe, model_dir: Path, console: Console) -> int:
    """Those of the recipe, or the positions of a teacher that has fewer."""
    from daramgpt import teacher

    wanted, positions = recipe.curriculum.context_tokens, teacher.max_positions(model_dir)
    if positions >= wanted:
        return wanted
    console(f"context: {positions} tokens, the teacher's positions (the recipe has {wanted})")
    return positions


def _train_tokenizer(recipe: Recipe, run: RunDirectory, console: Console) -> Path:
    """The tokenizer of a teacher that the run trains, made from the corpora where it is not there yet."""
    from daramgpt import curriculum, tokenizer

    assert recipe.teacher is not None and recipe.teacher.train is not None
    folder, vocab_size = run.path / "tokenizer", recipe.teacher.train.vocab_size
    # Written last of its files.
    if not (folder / "tokenizer_config.json").is_file():
        console(f"tokenizer: training {vocab_size:,} pieces")
        texts = curriculum.texts(recipe, curriculum.corpus_dir(recipe, run), TOKENIZER_TEXT_BYTES)
        tokenizer.train_tokenizer(texts, vocab_size, folder)
    return folder


def plan(
    recipe: Recipe, run: RunDirectory, console: Console, num_gpus: int | None = None, nodes: Nodes | None = None
) -> None:
    """Freeze what shapes the arithmetic of the run and its parts.

    What is frozen stays, but where the ranks, the kind of device or the settings of the engine are no longer those that
    it was made for: then all of that is chosen anew, and the batch a step, the steps and the rows of each stay.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        num_gpus: ranks, all on this machine; None = one a GPU.
        nodes: several machines; each is taken to be like this one.
    """
    from daramgpt import planner, planning, status
    from daramgpt.ledger import Ledger, sessions

    if recipe.student.init != "random":
        from daramgpt import initialisation

        initialisation.check_recipe(recipe)
    machine = hardware.detect()
    with locked(run):
        trainings = parts_of(recipe, run)
        frozen = {label: planner.read_plan(part_run) for label, _, part_run in trainings}
        # On a CPU only the command line says how many ranks there are.
        as_before = max((old["world_size"] for old in frozen.values() if old is not None), default=1)
        ranks_here = max(nodes.slots.values()) if nodes else num_gpus or len(machine.gpus) or as_before
        ranks, wanted = nodes.num_ranks if nodes else ranks_here, []
        for label, part, part_run in trainings:
            old = frozen[label]
            changes = () if old is None else planning.changes(old, part, machine, ranks)
            if old is not None and (not changes or _is_trained(part_run, old)):
                if (followed := planner.with_recipe(old, part)) != old:
                    write_json(part_run.plan, followed)
                continue
            if changes:
                console(f"{label}: planning anew, the batch a step stays ({'; '.join(changes)})")
            folder = teacher_dir(part, run) if part.teacher else None
            wanted.append(planning.Part(label, part, part_run, folder, old, changes))
        if wanted:
            shards = open_shards(run)
            is_loaded = recipe.teacher is not None and recipe.teacher.model is not None
            planning.make_plans(
                wanted,
                recipe,
                run,
                shards,
                planning.vocab_size(teacher_dir(recipe, run) if is_loaded else None, shards),
                ranks,
                ranks_here,
                console,
            )
            for planned in wanted:
                if planned.old is not None:
                    Ledger(run.ledger).note(what=f"{planned.label}: planned anew", changes=list(planned.changes))
            # A command that comes after, without these settings, is to find them.
            write_atomically(run.recipe, recipes.dump(recipe))
        console(f"machine: {machine.describe()}")
        plans = {label: planner.read_plan(part_run) for label, _, part_run in trainings}
        planner.describe({label: frozen for label, frozen in plans.items() if frozen is not None}, console)
        if line := status.calendar_line(recipe, run, sessions(run.ledger)):
            console(line)


def _is_trained(run: RunDirectory, plan: dict[str, Any]) -> bool:
    """Whether all steps of a plan are, so that no machine needs another."""
    from daramgpt import checkpoint

    return int((checkpoint.newest_state(run.checkpoints) or {}).get("step", 0)) >= plan["num_steps"]


def forecast(recipe: Recipe, run: RunDirectory, names: list[str]) -> list[str]:
    """Lines on memory and hours on GPUs that need not be at hand.

    Args:
        recipe, run: as from `resolve`; where the run has shards, they say how many tokens there are.
        names: such as ``"T4 x 2"``; none = every GPU that is known.

    Raises:
        UserError: a GPU is not known, or the recipe trains its own teacher.
    """
    from daramgpt import planning, teacher

    if recipe.teacher is None or recipe.teacher.model is None:
        raise UserError(
            f"recipe {recipe.name} trains a teacher of its own, which takes minutes anywhere",
            "ask for the hours of a recipe with teacher.model, such as daramgpt",
        )
    shards = open_shards(run) if (run.shards / "index.json").is_file() else None
    teacher_dir = teacher.resolve(recipe.teacher.model, recipe.teacher.revision, only_config=True)
    return planning.forecast(recipe, names, teacher_dir, shards)


def probe_candidate(folder: Path) -> None:
    """Answer on standard output what one micro-batch does; see `daramgpt.planner.probe`.

    Args:
        folder: ``recipe.toml`` and ``job.json`` of the candidate.
    """
    from daramgpt import planning

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    run, plan = RunDirectory(Path(job["run"])), job["plan"]
    whole = recipes.load(str(folder / "recipe.toml"))
    recipe = next(part for label, part, _ in parts_of(whole, run) if label == job["label"])
    loaded = load_teacher(recipe, run, plan) if recipe.teacher is not None else None
    print(json.dumps(planning.try_candidate(recipe, RunDirectory(folder), open_shards(run), plan, loaded)))
