"""What each command does with a run: the order of the steps, and how the parts of a run hang together.

A run whose recipe trains its own teacher has a part ``parts/teacher``, trained first; one that compares with the same
student without a teacher has ``parts/baseline``, trained last. Parts share the shards of the run. Heavy imports are
inside the functions, so that each command pays only for what it uses.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import hardware
from daramgpt import recipe as recipes
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, locked, write_atomically

if TYPE_CHECKING:
    from daramgpt.launcher import Nodes
    from daramgpt.progress import Console
    from daramgpt.shards import Shards
    from daramgpt.teacher import Teacher

# Text that a tokenizer is trained from.
TOKENIZER_TEXT_BYTES = 3_000_000


def resolve(
    source: str,
    corpus: Path | None = None,
    ds_config: str | None = None,
    run_path: Path | None = None,
    settings: list[str] | None = None,
) -> tuple[Recipe, RunDirectory]:
    """The recipe and the run directory that a command line means.

    A run keeps the recipe it was made with. A command that gives no settings of its own uses that one; settings that
    would change what the run computes are refused with the difference.

    Raises:
        UserError: the recipe is at fault, or differs from the run's.
    """
    overrides = [*(settings or [])]
    if corpus is not None:
        overrides.append(f"corpus.dir={json.dumps(str(corpus), ensure_ascii=False)}")
    if ds_config is not None:
        overrides.append(f"engine.ds_config={json.dumps(ds_config, ensure_ascii=False)}")
    recipe = _absolute(recipes.load(source, overrides))
    run = RunDirectory((run_path or Path("runs") / recipe.name).absolute())
    # Until there are shards nothing has been computed that another recipe could contradict.
    if run.recipe.is_file() and (run.shards / "index.json").is_file():
        stored = recipes.load(str(run.recipe))
        if not overrides:
            return stored, run
        if changed := recipes.differences(stored, recipe):
            raise UserError(
                f"{run.recipe}: that run was begun with other settings: {'; '.join(changed)}",
                "give the same settings, or another --run",
            )
    return recipe, run


def _absolute(recipe: Recipe) -> Recipe:
    """Paths of this machine made absolute, so that a later command may run in another folder."""
    changes: dict[str, Any] = {}
    if recipe.corpus.dir:
        folder = str(Path(recipe.corpus.dir).expanduser().resolve())
        changes["corpus"] = recipe.corpus.model_copy(update={"dir": folder})
    teacher = recipe.teacher
    if teacher is not None and teacher.model and Path(teacher.model).expanduser().is_dir():
        changes["teacher"] = teacher.model_copy(update={"model": str(Path(teacher.model).expanduser().resolve())})
    if recipe.engine.ds_config.endswith(".json"):
        file = str(Path(recipe.engine.ds_config).expanduser().resolve())
        changes["engine"] = recipe.engine.model_copy(update={"ds_config": file})
    return recipe.model_copy(update=changes)


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


def prepare(recipe: Recipe, run: RunDirectory, console: Console, estimate_only: bool = False) -> None:
    """Corpus → tokenizer → token shards; or, of the shards, only what they would take."""
    from daramgpt import shards, tokenizer

    with locked(run):
        if not estimate_only:
            write_atomically(run.recipe, recipes.dump(recipe))
        context_tokens = recipe.curriculum.context_tokens
        _make_corpus(recipe, run, console)
        if recipe.teacher is not None and recipe.teacher.model:
            from daramgpt import teacher

            tokenizer_dir = teacher.resolve(recipe.teacher.model, recipe.teacher.revision)
            positions = teacher.max_positions(tokenizer_dir)
            if positions < context_tokens:
                console(f"context: {positions} tokens, the teacher's positions (the recipe has {context_tokens})")
                context_tokens = positions
        else:
            assert recipe.teacher is not None
            assert recipe.teacher.train is not None
            tokenizer_dir = run.path / "tokenizer"
            # Written last of its files.
            if not (tokenizer_dir / "tokenizer_config.json").is_file():
                from daramgpt import curriculum

                console(f"tokenizer: training {recipe.teacher.train.vocab_size:,} pieces")
                texts = curriculum.texts(recipe, curriculum.corpus_dir(recipe, run), TOKENIZER_TEXT_BYTES)
                tokenizer.train_tokenizer(texts, recipe.teacher.train.vocab_size, tokenizer_dir)
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


def _parts(recipe: Recipe, run: RunDirectory) -> list[tuple[str, Recipe, RunDirectory]]:
    """The trainings of a run in their order: label, recipe, directory."""
    parts = []
    if recipe.teacher is not None and recipe.teacher.train is not None:
        parts.append(("teacher", recipe.teacher_part(), run.part("teacher")))
    parts.append(("student", recipe, run))
    if recipe.evaluation.baseline:
        parts.append(("student without a teacher", recipe.baseline_part(), run.part("baseline")))
    return parts


def plan(
    recipe: Recipe, run: RunDirectory, console: Console, num_gpus: int | None = None, nodes: Nodes | None = None
) -> None:
    """Freeze what shapes the arithmetic of the run and its parts; what is frozen already stays.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        num_gpus: ranks, all on this machine; None = one a GPU.
        nodes: several machines; each is taken to be like this one.
    """
    from daramgpt import planner, planning

    machine = hardware.detect()
    with locked(run):
        parts = _parts(recipe, run)
        missing = [part for part in parts if planner.read_plan(part[2]) is None]
        if missing:
            ranks_here = max(nodes.slots.values()) if nodes else num_gpus or max(1, len(machine.gpus))
            shards = _shards(run)
            is_loaded = recipe.teacher is not None and recipe.teacher.model is not None
            planning.make_plans(
                [
                    planning.Part(label, part, part_run, _teacher_dir(part, run) if part.teacher else None)
                    for label, part, part_run in missing
                ],
                recipe,
                run,
                shards,
                planning.vocab_size(_teacher_dir(recipe, run) if is_loaded else None, shards),
                nodes.num_ranks if nodes else ranks_here,
                ranks_here,
                console,
            )
        console(f"machine: {machine.describe()}")
        plans = {label: planner.read_plan(part_run) for label, _, part_run in parts}
        planner.describe({label: frozen for label, frozen in plans.items() if frozen is not None}, console)


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
    shards = _shards(run) if (run.shards / "index.json").is_file() else None
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
    recipe = next(part for label, part, _ in _parts(whole, run) if label == job["label"])
    loaded = _load_teacher(recipe, run, plan) if recipe.teacher is not None else None
    print(json.dumps(planning.try_candidate(recipe, RunDirectory(folder), _shards(run), plan, loaded)))


def train_on_ranks(
    recipe: Recipe,
    run: RunDirectory,
    console: Console,
    hours: float | None,
    num_gpus: int | None,
    nodes: Nodes | None,
) -> None:
    """Train in this process, or where the plan has several ranks, in as many that DeepSpeed's launcher starts.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        hours: as from `train`.
        num_gpus: ranks on this machine that the command line asks for; must be those of the plan.
        nodes: several machines; as from `launcher.read_nodes`.

    Raises:
        UserError: there is no plan or it is for other ranks, the shards are missing, or a rank refused to go on.
        launcher.RankError: a rank failed.
    """
    from daramgpt import launcher, planner

    node_rank = nodes.node_rank if nodes else None
    where = f" on the first node, and share its run directory or copy it to {run.path}" if node_rank else ""
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
        if world_size == 1:
            train(recipe, run, console, hours)
            return
        if nodes is not None and node_rank is not None:
            console(
                f"node {node_rank} of {len(nodes.slots)}: joining {nodes.address}:{nodes.port}; "
                f"node 0 shows the progress, what goes wrong here is in {run.node_log(node_rank)}"
            )
        write_atomically(run.session_recipe(node_rank), recipes.dump(recipe))
        arguments = ["train-rank", str(run.path), "--node", str(node_rank or 0), "--session-start"]
        arguments += [str(_session_start()), *(["--hours", str(hours)] if hours is not None else [])]
        launcher.start_ranks(arguments, world_size, nodes, run)


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
            "give train the --num-gpus or --hostfile that plan was given, or remove the plans and plan again",
        )


def run_directory(source: str, run_path: Path | None) -> RunDirectory:
    """The directory of a run that may not have begun.

    Raises:
        UserError: there is no such recipe.
    """
    return RunDirectory(run_path.absolute() if run_path else (Path("runs") / recipes.load(source).name).absolute())


def train(
    recipe: Recipe, run: RunDirectory, console: Console, hours: float | None, session_start: float | None = None
) -> str:
    """Train the run and its parts on this rank, as far as the session goes.

    Args:
        recipe, run: as from `resolve`.
        console: for lines.
        hours: of this session; None = as the recipe says.
        session_start: Unix time; None = as ``launch.sh`` says, else now.

    Returns:
        ``done``, ``deadline`` or ``interrupted``.
    """
    from daramgpt import launcher, planner
    from daramgpt.train import StopRequest

    hours = recipe.budget.session_hours if hours is None else hours
    start = _session_start() if session_start is None else session_start
    stop = StopRequest(None if hours is None else start + 3600 * hours, run.stop_request)
    stop.listen()
    machine = hardware.detect().describe()
    for label, part, part_run in _parts(recipe, run):
        frozen = planner.read_plan(part_run)
        if frozen is None:
            raise UserError(f"{part_run.plan} is missing", f"run: python -m daramgpt plan {recipe.name}")
        reason = _train_part(label, part, part_run, frozen, run, stop, console, machine)
        if reason != "done":
            console(f"{label}: stopped ({reason}); everything is saved, the same command goes on from here")
            return reason
        if label == "teacher":
            if os.environ.get("RANK", "0") == "0":
                _export_teacher(part, part_run, run)
            # The others must not load it before it is there.
            launcher.check_agreement({"the teacher": "exported"}, run.log)
    return "done"


def _train_part(
    label: str,
    part: Recipe,
    part_run: RunDirectory,
    frozen: dict[str, Any],
    run: RunDirectory,
    stop: Any,
    console: Console,
    machine: str,
) -> str:
    """One training; returns at once where all its steps are trained."""
    from daramgpt import checkpoint, launcher

    saved = checkpoint.newest(part_run.checkpoints, console)
    facts = {
        "settings": part.model_dump_json(exclude={"corpus": True, "teacher": {"model"}, "engine": {"ds_config"}}),
        "plan.json": json.dumps(frozen),
        "shards": _text(run.shards / "index.json"),
        "checkpoints": f"{saved.path.name} {saved.sha256}" if saved else "none",
    }
    if part.teacher is not None:
        facts["the teacher's config.json"] = _text(_teacher_dir(part, run) / "config.json")
    launcher.check_agreement(facts, run.log)
    if saved is not None and saved.state["step"] >= frozen["num_steps"]:
        console(f"{label}: all {frozen['num_steps']:,} steps are trained")
        return "done"
    # What is not needed to find that out is imported from here on.
    from daramgpt.train import train as train_loop

    loaded = None
    if part.teacher is not None:
        loaded = _load_teacher(part, run, frozen)
        weights = f"{frozen['teacher_precision']}, {loaded.weight_bytes / 1e6:,.1f} MB"
        console(f"teacher: {loaded.num_parameters:,} parameters, {weights}")
    return train_loop(part, part_run, _shards(run), frozen, loaded, stop, console, run.ledger, machine, label)


def _load_teacher(part: Recipe, run: RunDirectory, plan: dict[str, Any]) -> Teacher:
    """The teacher of a training, on this rank's device in the plan's precision; `run` is the run itself."""
    import torch

    from daramgpt import teacher

    assert part.teacher is not None
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    return teacher.load(
        _teacher_dir(part, run),
        plan["teacher_precision"],
        teacher.DTYPES[plan["dtype"]],
        device,
        run.teacher_weights,
        part.teacher.half_accumulation,
    )


def _export_teacher(part: Recipe, part_run: RunDirectory, run: RunDirectory) -> None:
    """The trained teacher as a Hugging Face directory, from which it is loaded like any other."""
    from daramgpt import checkpoint, export

    saved = checkpoint.newest(part_run.checkpoints)
    assert saved is not None
    record = {"checkpoint_sha256": saved.sha256}
    if not export.stands(part_run.export, record):
        tokenizer_dir = _shards(run).tokenizer_dir
        model = export.restore_student(part.student, saved.weights(), tokenizer_dir)
        export.save_model(model, tokenizer_dir, part_run.export, record=record)


def _text(path: Path) -> str:
    """Of a small file; empty where there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _teacher_dir(recipe: Recipe, run: RunDirectory) -> Path:
    """Directory of the run's teacher; `run` is the run itself, not a part."""
    from daramgpt import teacher

    assert recipe.teacher is not None
    if recipe.teacher.model:
        return teacher.resolve(recipe.teacher.model, recipe.teacher.revision)
    return run.part("teacher").export


def _session_start() -> float:
    """Unix time at which the session began; ``launch.sh`` says when."""
    return float(os.environ.get("DARAMGPT_SESSION_START") or time.time())


def _shards(run: RunDirectory) -> Shards:
    from daramgpt.shards import Shards

    if not (run.shards / "index.json").is_file():
        raise UserError(f"{run.shards} holds no shards", "prepare the run first: python -m daramgpt prepare RECIPE")
    return Shards(run.shards)
