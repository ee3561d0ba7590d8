"""The command line: a function a command, its arguments as typer reads them.

Heavy imports wait inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daramgpt.cli import exit_codes
from daramgpt.cli.options import (
    AllowChangesOption,
    CorpusOption,
    DsConfigOption,
    HostfileOption,
    HoursOption,
    MasterAddrOption,
    MasterPortOption,
    NodeRankOption,
    NumGpusOption,
    RecipeArgument,
    RunOption,
    SetOption,
)

if TYPE_CHECKING:
    from daramgpt.launcher import Nodes
    from daramgpt.progress import Console
    from daramgpt.recipe import Recipe
    from daramgpt.run_directory import RunDirectory

app = typer.Typer(
    name="daramgpt",
    help="Distil a large Korean GPT into a small one on hardware people get for free.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _begin(
    recipe: str,
    corpus: Path | None,
    ds_config: str | None,
    run: Path | None,
    settings: list[str] | None,
    keeps_log: bool = True,
    allows_changes: bool = False,
) -> tuple[Recipe, RunDirectory, Console]:
    from daramgpt import commands
    from daramgpt.errors import UserError
    from daramgpt.progress import Console

    resolved, directory = commands.resolve(recipe, corpus, ds_config, run, settings, allows_changes)
    exit_codes.note_folder(directory.path)
    if keeps_log:
        try:
            directory.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--run: {directory.path} cannot be made ({error.strerror})", "give a folder that can be written"
            ) from None
    return resolved, directory, Console(directory.log if keeps_log else None)


def _nodes(num_gpus: int | None, hostfile: Path | None, *options: Any) -> Nodes | None:
    from daramgpt import launcher
    from daramgpt.errors import UserError

    if num_gpus is not None and hostfile is not None:
        raise UserError("--num-gpus and --hostfile both say how many ranks there are", "give one of them")
    return launcher.read_nodes(hostfile, *options)


@app.command()
def doctor(
    recipe: RecipeArgument = "quickstart",
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    allow_changes: AllowChangesOption = False,
) -> None:
    """Check this machine and what the recipe names; exit 2 when something blocks the run."""
    from daramgpt import commands

    resolved, directory, console = _begin(recipe, corpus, ds_config, run, settings, False, allow_changes)
    commands.doctor(resolved, directory, console)


@app.command()
def prepare(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Bad input is fatal: corpus.strict.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it will take: tokens, disk, time.")
    ] = False,
    allow_changes: AllowChangesOption = False,
) -> None:
    """Read the corpora in the order of the curriculum and write token shards."""
    from daramgpt import commands

    settings = [*(settings or []), *(["corpus.strict=true"] if strict else [])]
    begun = _begin(recipe, corpus, ds_config, run, settings, allows_changes=allow_changes)
    commands.prepare(*begun, estimate_only=estimate, allows_changes=allow_changes)


@app.command()
def plan(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    num_gpus: NumGpusOption = None,
    hostfile: HostfileOption = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help='Only say what "T4 x 2" or another GPU would take; nothing is frozen.')
    ] = None,
    gpus: Annotated[bool, typer.Option("--gpus", help="Only say what each known GPU would take.")] = False,
    allow_changes: AllowChangesOption = False,
) -> None:
    """Choose micro-batch, precision and schedule, predict memory and hours, and freeze them in plan.json."""
    from daramgpt import commands

    if gpu is not None or gpus:
        wanted, run_directory = commands.resolve(recipe, corpus, ds_config, run, settings)
        print("\n".join(commands.forecast(wanted, run_directory, [] if gpu is None else [gpu])))
        return
    nodes = _nodes(num_gpus, hostfile)
    resolved, directory, console = _begin(recipe, corpus, ds_config, run, settings, allows_changes=allow_changes)
    commands.plan(resolved, directory, console, num_gpus, nodes)


@app.command()
def train(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    hours: HoursOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    num_gpus: NumGpusOption = None,
    hostfile: HostfileOption = None,
    node_rank: NodeRankOption = None,
    master_addr: MasterAddrOption = None,
    master_port: MasterPortOption = None,
    after_save: Annotated[
        str | None, typer.Option("--after-save", help="Command run with each new checkpoint: persistence.after_save.")
    ] = None,
    allow_changes: AllowChangesOption = False,
) -> None:
    """Train, from the newest checkpoint on, until the end, the deadline, or a signal."""
    from daramgpt import commands

    nodes = _nodes(num_gpus, hostfile, node_rank, master_addr, master_port)
    if after_save is not None:
        settings = [*(settings or []), f"persistence.after_save={json.dumps(after_save, ensure_ascii=False)}"]
    resolved, directory, console = _begin(recipe, corpus, ds_config, run, settings, allows_changes=allow_changes)
    commands.train_on_ranks(resolved, directory, console, hours, num_gpus, nodes, allow_changes)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="MODEL", help="Measure another model too: a folder or hub id. Repeatable."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option("--tasks", help="Folder with kobest/ and nsmc/: fine-tune and score on them too.")
    ] = None,
) -> None:
    """Measure teacher and student on held-out text, and let them continue the prompts."""
    from daramgpt import evaluation
    from daramgpt import tasks as downstream

    resolved, directory, console = _begin(recipe, corpus, ds_config, run, settings)
    # Read first: what is wrong with them shows before the minutes of a measurement.
    found = None if tasks is None else downstream.read(resolved, tasks)
    evaluation.evaluate(resolved, directory, console, compare or ())
    if tasks is not None and found is not None:
        downstream.measure(resolved, directory, tasks, found, console)


@app.command()
def export(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository on the hub.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Where --push makes the repository, let everybody see it.")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option("--gguf", metavar="TYPE", help="Write it for llama.cpp too, with weights in f32, f16 or q8_0."),
    ] = None,
) -> None:
    """Write the student as a Hugging Face directory with a model card."""
    from daramgpt import export as exporter
    from daramgpt.errors import UserError

    if public and push is None:
        raise UserError("--public says who sees what --push uploads", "give --push OWNER/NAME too")
    resolved, directory, console = _begin(recipe, corpus, ds_config, run, settings)
    exporter.export(resolved, directory, console)
    if gguf is not None:
        from daramgpt import gguf_export

        gguf_export.export(directory, gguf, console)
    if push is not None:
        exporter.push(directory, push, public, console)


@app.command()
def report(
    recipe: RecipeArgument,
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
) -> None:
    """Write report.html from what the run has recorded."""
    from daramgpt import report as reporter

    _, directory, console = _begin(recipe, corpus, ds_config, run, settings)
    reporter.write(directory, console)


@app.command()
def status(
    recipe: RecipeArgument = "quickstart",
    corpus: CorpusOption = None,
    ds_config: DsConfigOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Exit 0 when all is done, else 3.")] = False,
    allow_changes: AllowChangesOption = False,
) -> None:
    """Show how far a run is: each stage, each session."""
    from dataclasses import asdict

    from daramgpt import commands
    from daramgpt import status as statuses
    from daramgpt.text_table import counted

    resolved, directory = commands.resolve(recipe, corpus, ds_config, run, settings, allow_changes)
    found = statuses.read(directory, resolved.budget)
    if quiet:
        if found.state != "done":
            raise typer.Exit(3)
        print(
            f"All done: {counted(found.num_steps, 'steps')}, report in {directory.report}, model in {directory.export}"
        )
    elif as_json:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=2))
    else:
        print("\n".join(statuses.lines(found, directory)))


@app.command()
def generate(
    recipe: RecipeArgument = "quickstart",
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text to continue; without it, each line that you type.")
    ] = None,
    run: RunOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the teacher continue it too.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to add at most.")] = 80,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.01, max=1.0, help="Likeliest tokens of so much probability.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="So many likeliest tokens; 0 = all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawing.")] = 0,
) -> None:
    """Let the exported student continue a text."""
    from daramgpt import commands
    from daramgpt.generate import Sampling

    sampling = Sampling(temperature, top_p, top_k, seed)
    commands.generate(commands.run_directory(recipe, run), prompt, compare, tokens, sampling)


@app.command("probe-candidate", hidden=True)
def probe_candidate(folder: Annotated[Path, typer.Argument()]) -> None:
    """Try one micro-batch for `plan`."""
    from daramgpt import commands

    commands.probe_candidate(folder)


@app.command("train-rank", hidden=True)
def train_rank(
    run: Annotated[Path, typer.Argument()],
    node: Annotated[int, typer.Option("--node")],
    session_start: Annotated[float, typer.Option("--session-start")],
    hours: HoursOption = None,
    allow_changes: AllowChangesOption = False,
) -> None:
    """One rank of a training that a launcher has started."""
    from daramgpt import commands
    from daramgpt import recipe as recipes
    from daramgpt.progress import Console
    from daramgpt.run_directory import RunDirectory

    directory = RunDirectory(run)
    resolved = recipes.load(str(directory.session_recipe(node)))
    is_first = os.environ["RANK"] == "0"
    console = Console(directory.log, silent=not is_first)
    commands.train(resolved, directory, console, hours, session_start, allow_changes)
    if os.environ["WORLD_SIZE"] != "1":
        from daramgpt.engine import leave_ranks

        leave_ranks()


def main() -> None:
    """Run a command and turn what goes wrong into exit codes."""
    code = exit_codes.guarded(lambda: app(sys.argv[1:] or ["--help"], standalone_mode=False))
    if code and sys.argv[1:2] == ["train-rank"]:
        # The threads of a rank that is still connected to others may abort it while the interpreter ends, and what the
        # launcher would see is a crash instead of a refusal.
        exit_codes.leave_at_once(code)
    sys.exit(code)
