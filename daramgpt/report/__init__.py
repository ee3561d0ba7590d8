"""``report.html``: one self-contained page from what a run wrote, complete or not; its curves as PNG files beside it.

It reads files and computes nothing anew, so it imports nothing that trains and takes no time. What a run has not
written yet is named at the end of the page instead of being passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from daramgpt import recipe as recipes
from daramgpt import results_table, status
from daramgpt.generate import Sampling
from daramgpt.recipe import Loss
from daramgpt.report import chart
from daramgpt.report.curves import charts
from daramgpt.report.page import facts, page, section, table, tiles
from daramgpt.run_directory import RunDirectory, read_json, read_text, write_atomically
from daramgpt.tasks import quoted
from daramgpt.tasks import table as task_tables

Data = dict[str, Any]
# Of a list that may be as long as the corpora are broken.
MOST_LINES = 500


def write(run: RunDirectory, say: Callable[[str], None]) -> None:
    """Write ``report.html`` of a run, whatever of the run there is.

    Raises:
        UserError: the run's recipe cannot be read.
    """
    found = status.read(run)
    recipe: Data = {}
    if run.recipe.is_file():
        recipe = recipes.load(str(run.recipe)).model_dump(mode="json", exclude_none=True)
    # The report itself is what is being written.
    missing = [step for step in found.missing if step != "report"]
    state = "done" if not missing else found.state
    name = str(recipe.get("name", run.path.name))
    damaged: list[str] = []
    evaluation = _usable(
        run.evaluation, damaged, lambda data: (_head(name, state, found, data), _evaluation(data), _samples(data))
    )
    plan = _usable(run.plan, damaged, lambda data: facts(_run_facts(recipe, data, evaluation)))
    hours = found.sessions, found.budget_hours
    index = _usable(
        run.shards / "index.json",
        damaged,
        lambda data: (_curriculum(found, data), _reading(data), charts(run, data, plan, *hours)),
    )
    tasks = _usable(run.tasks, damaged, _tasks)
    drawn = charts(run, index, plan, *hours)
    sections = [
        _head(name, state, found, evaluation),
        section("What was run", facts(_run_facts(recipe, plan, evaluation))),
        _curriculum(found, index),
        _reading(index),
        _curves(drawn),
        _evaluation(evaluation),
        _tasks(tasks),
        _samples(evaluation),
        _sessions(found),
        _reproduce(run),
        _missing(missing, damaged, run),
    ]
    write_atomically(run.report, page(f"{name}: DaramGPT report", sections))
    if can_draw():
        for one in drawn:
            chart.save_png(one, run.pictures / f"{one.name}.png")
    say(f"report: {run.report}" + (f" (not there yet: {', '.join(missing)})" if missing else ""))


def _usable(path: Path, damaged: list[str], show: Callable[[Data], Any]) -> Data:
    """What a file holds if that can be shown; else nothing, and the file is among the `damaged`."""
    data = read_json(path)
    try:
        show(data)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        damaged.append(path.name)
        return {}
    return data


def _head(name: str, state: str, found: status.Status, evaluation: Data) -> str:
    figures = [
        ("steps", f"{found.step:,} of {found.num_steps:,}"),
        ("tokens trained", f"{found.tokens:,}"),
        (f"hours of training, of {found.budget_hours:g}", f"{found.hours_used:.3g}"),
    ]
    for row in evaluation.get("rows", []):
        if row["name"] in ("teacher", "student", "student without teacher"):
            figures.append((f"bits per byte, {row['name']}", results_table.number(row["bits_per_byte"]["all"], ".4f")))
    mark = f'<span class="state {escape(state)}">{escape(state)}</span>'
    return f"<header><h1>{escape(name)}{mark}</h1>{tiles(figures)}</header>"


def _run_facts(recipe: Data, plan: Data, evaluation: Data) -> list[tuple[str, str]]:
    teacher, student, loss = recipe.get("teacher", {}), recipe.get("student", {}), recipe.get("loss", {})
    optimizer, trained = recipe.get("optimizer", {}), teacher.get("train", {})
    corpus = recipe.get("corpus", {})
    teacher_text = teacher.get("model", "")
    if trained:
        teacher_text = f"trained from the same text: {_shape(trained)}"
    return [
        ("corpus", corpus.get("dir") or (corpus.get("made_megabytes") and "made by the built-in grammar") or ""),
        ("teacher", f"{teacher_text}; precision {plan.get('teacher_precision')}" if teacher_text else ""),
        ("student", _shape(student) if student else ""),
        ("loss", Loss.model_validate(loss).formula if loss else ""),
        (
            "optimizer",
            f"AdamW, learning rate {optimizer['learning_rate']:g}, weight decay {optimizer['weight_decay']:g}"
            if optimizer
            else "",
        ),
        (
            "batch",
            f"{plan['batch_rows']} rows of {plan['context_tokens']} tokens, {plan['micro_batch_rows']} at a time"
            if {"batch_rows", "context_tokens", "micro_batch_rows"} <= plan.keys()
            else "",
        ),
        ("arithmetic", f"{plan['dtype']}, ds_config {plan.get('ds_config')}" if "dtype" in plan else ""),
        ("ranks", str(plan.get("world_size", ""))),
        ("evaluated on", str(evaluation.get("hardware", ""))),
        ("versions", ", ".join(f"{name} {number}" for name, number in evaluation.get("versions", {}).items())),
    ]


def _shape(shape: Data) -> str:
    return f"GPT-2, n_embd {shape['n_embd']}, n_head {shape['n_head']}, n_layer {shape['n_layer']}"


def _curriculum(found: status.Status, index: Data) -> str:
    if not found.stages or not index:
        return ""
    details = {stage["name"]: stage for stage in index.get("stages", [])}
    cells = [["stage", "corpus", "unit", "text", "tokens", "held-out text", "steps", "trained"]]
    for number, stage in enumerate(found.stages, 1):
        more = details[stage.name]
        cells.append(
            [
                f"{number}  {stage.name}",
                more["corpus"],
                more["unit"],
                f"{stage.text_bytes / 1e6:,.2f} MB",
                f"{stage.tokens:,}",
                f"{more['heldout_text_bytes'] / 1e3:,.0f} kB",
                f"{stage.first_step:,} – {stage.last_step:,}",
                f"{stage.trained_fraction:.0%}",
            ]
        )
    return section("Curriculum", table(cells, num_left=3))


def _reading(index: Data) -> str:
    """What cleaning did in each stage, and every file that was not read whole, by name."""
    stages = index.get("stages", [])
    rules = sorted({rule for stage in stages for rule in stage["cleaned"]})
    cells = [
        ["what the readers did", *(stage["name"] for stage in stages)],
        *([rule, *(f"{stage['cleaned'].get(rule, 0):,}" for stage in stages)] for rule in rules),
    ]
    parts = [table(cells)] if rules else []
    for kind, heading in (("faults", "Not read whole"), ("notes", "Read, with something to note")):
        lines = [f"{stage['name']}: {line}" for stage in stages for line in stage.get(kind, ())]
        if lines:
            shown = escape("\n".join(lines[:MOST_LINES]))
            more = f"\n… {len(lines) - MOST_LINES:,} more in shards/index.json" if len(lines) > MOST_LINES else ""
            parts.append(f"<details><summary>{heading}: {len(lines):,}</summary><pre>{shown}{more}</pre></details>")
    return section("Corpora", *parts) if parts else ""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _curves(drawn: list[chart.Chart]) -> str:
    if not drawn:
        return ""
    if not can_draw():
        return section("Curves", "<p>Curves need matplotlib: pip install matplotlib, then write the report again.</p>")
    note = (
        "Losses of a step are measured before the model learns from it. Dashed vertical lines part the stages of the "
        "curriculum, in the order of the table above; the very first steps may lie above the picture."
    )
    figures = "".join(map(chart.as_html, drawn))
    return section("Curves", f'<div class="charts">{figures}</div>', _soft(note))


def _tasks(tasks: Data) -> str:
    """KoBEST and NSMC."""
    parts: list[str] = []
    if tasks.get("summary"):
        parts += [table(task_tables.finetuned_cells(tasks["summary"]), num_left=2), *map(_soft, task_tables.LEGEND)]
        parts.append(_soft(task_tables.sources(quoted.FINETUNED)))
    if tasks.get("zero_shot"):
        parts += [table(task_tables.zero_shot_cells(tasks["zero_shot"]))]
        parts.append(_soft(task_tables.sources(quoted.ZERO_SHOT)))
    if not parts:
        return ""
    return section("KoBEST and NSMC", *parts, _soft(f"Measured at step {tasks['model']['step']:,}."))


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _evaluation(evaluation: Data) -> str:
    rows = evaluation.get("rows")
    if not rows:
        return ""
    heldout = evaluation.get("heldout", {}).values()
    measured = sum(stage["text_bytes"] for stage in heldout)
    documents = sum(stage["documents"] for stage in heldout)
    note = (
        f"Measured at step {evaluation['step']:,} on {measured / 1e3:,.0f} kB of text from {documents:,} held-out "
        f"documents, {evaluation['date']}. KL is in nats a token at T = 1."
    )
    if names := results_table.compared_names(rows):
        note += f" No models of this run, compared on the same text: {', '.join(names)}."
    return section(
        "Evaluation",
        table(results_table.model_cells(rows)),
        _soft(note),
        table(results_table.stage_cells(rows)),
        *_forgetting(evaluation.get("forgetting")),
    )


def _forgetting(rows: list[Data] | None) -> list[str]:
    """What each stage gave and took: the student after every one of them."""
    if not rows:
        return []
    heading = f"{results_table.FORGETTING[0].upper()}{results_table.FORGETTING[1:]}."
    return [_soft(heading), table(results_table.forgetting_cells(rows))]


def _samples(evaluation: Data) -> str:
    samples = evaluation.get("samples", [])
    groups = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        cards = "".join(
            f'<div class="sample"><small>{escape(sample["model"])}</small>'
            f"<b>{escape(prompt)}</b><span>{escape(sample['text'])}</span></div>"
            for sample in samples
            if sample["prompt"] == prompt
        )
        groups.append(f'<div class="samples" lang="ko">{cards}</div>')
    drawn = Sampling()
    note = f"Sampled at temperature {drawn.temperature:g}, top-p {drawn.top_p:g}, all models with the same seed."
    return section("Continuations", *groups, _soft(note)) if groups else ""


def _sessions(found: status.Status) -> str:
    if not found.sessions:
        return ""
    cells = [["session", "training", "machine", "started", "ended", "steps", "tokens", "minutes"]]
    for one in found.sessions:
        is_now = found.state == "running" and one is found.sessions[-1]
        cells.append(
            [
                str(one.number),
                one.training,
                one.machine,
                datetime.fromtimestamp(one.started).strftime("%Y-%m-%d %H:%M"),
                "now" if is_now else one.reason,
                f"{one.first_step:,} → {one.step:,}",
                f"{one.tokens:,}",
                f"{one.seconds / 60:,.1f}",
            ]
        )
    return section("Sessions", table(cells, num_left=5))


def _reproduce(run: RunDirectory) -> str:
    try:
        text = read_text(run.recipe)
    except (OSError, ValueError):
        return ""
    command = "# recipe.toml as below\nbash launch.sh recipe.toml --run runs/again"
    return section(
        "How to reproduce",
        f"<pre>{escape(command)}</pre>",
        "<p>The plan is made anew there; the same plan on the same machine gives the same weights. "
        "Take plan.json over as well to keep it.</p>",
        f"<details><summary>recipe.toml</summary><pre>{escape(text)}</pre></details>",
    )


def _missing(missing: list[str], damaged: list[str], run: RunDirectory) -> str:
    """What the page lacks because the run has not got there, or its files do not hold what they should."""
    files = [
        path.name
        for path in (run.recipe, run.plan, run.shards / "index.json", run.metrics, run.ledger, run.evaluation)
        if not path.is_file()
    ]
    if not missing and not files and not damaged:
        return ""
    parts = []
    if missing:
        parts.append(f"<p>The run has still to: {escape(', '.join(missing))}.</p>")
    if files:
        parts.append(f"<p>Not written, so not in this report: {escape(', '.join(files))}.</p>")
    if damaged:
        parts.append(f"<p>Damaged, so not in this report: {escape(', '.join(damaged))}.</p>")
    return section("What is missing", *parts)
