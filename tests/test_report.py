"""report.html from complete, partial and empty runs: self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.browser import browser, look
from daramgpt import recipe, report
from daramgpt.report import curves
from daramgpt.report.chart import MOST_POINTS, Chart, Series, Span, as_html, save_png, thin
from daramgpt.report.page import table
from daramgpt.run_directory import RunDirectory, write_atomically, write_json

VOID = {"meta", "link", "br"}


class Checker(HTMLParser):
    """Finds unbalanced tags and addresses that a browser would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # What begins so is in the page itself.
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def metrics_line(step: int, stage: str, kd: float) -> dict[str, object]:
    return {"step": step, "tokens": 1000 * step, "stage": stage, "loss": 5.0, "kd": kd, "ce": 6.0 - 0.01 * step}


def write_metrics(run: RunDirectory, lines: list[dict[str, object]]) -> None:
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))


def drawn(page: str) -> list[str]:
    """Titles of the charts, each with the colours of its lines behind it."""
    found: dict[str, list[str]] = {}
    for name, colour in re.findall(r'<g id="([a-z0-9-]+)-(\d)"', page):
        found.setdefault(name, []).append(colour)
    return [f"{name} {''.join(colours)}" for name, colours in found.items()]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    write_atomically(run.recipe, recipe.dump(recipe.load("quickstart")))
    stages = [
        {
            "name": name,
            "corpus": "web",
            "unit": "sentence",
            "rows": 100,
            "text_bytes": 600_000,
            "tokens": 100_000,
            "heldout_text_bytes": 4_000,
            "cleaned": {"repeated document dropped": 1234} if name == "wiki" else {},
            "faults": [f"{name}.zip!<{number}>: is empty" for number in range(600 if name == "wiki" else 0)],
            "notes": [],
        }
        for name in ("web-1", "wiki")
    ]
    write_json(run.shards / "index.json", {"stages": stages})
    write_json(
        run.plan,
        {
            "num_steps": 20,
            "batch_rows": 10,
            "micro_batch_rows": 5,
            "context_tokens": 100,
            "dtype": "fp32",
            "teacher_precision": "int8",
            "ds_config": "cpu",
        },
    )
    write_metrics(run, [metrics_line(step, "web-1" if step <= 10 else "wiki", 3.0) for step in range(1, 21)])
    session = {"session": 1, "time": 1.7e9, "machine": "2 cores <x>", "step": 0, "tokens": 0, "seconds": 0.0}
    end = {**session, "event": "end", "step": 20, "tokens": 20_000, "seconds": 90.0, "reason": "deadline"}
    write_atomically(
        run.ledger, json.dumps({**session, "event": "start", "training": "student"}) + "\n" + json.dumps(end) + "\n"
    )
    row = {
        "parameters": 1000,
        "bytes": 4000,
        "bits_per_byte": {"web-1": 1.25, "wiki": None, "all": 1.375},
        "kl_to_teacher": 0.5,
        "top1_agreement": 0.5,
        "tokens_per_second": 10.0,
    }
    samples = [{"prompt": "오늘", "model": name, "text": " <b>비가</b> 왔다."} for name in ("teacher", "student")]
    evaluation = {
        "rows": [{**row, "name": "teacher"}, {**row, "name": "student"}],
        "heldout": {"web-1": {"documents": 4, "text_bytes": 4000, "tokens": 700}},
        "samples": samples,
        "state": "partial",
        "step": 20,
        "date": "2026-01-01",
        "hardware": "2 cores",
        "versions": {"torch": "2"},
    }
    write_json(run.evaluation, evaluation)
    return run


def written(run: RunDirectory) -> str:
    report.write(run, lambda _: None)
    text = run.report.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.addresses == ["data:,"]
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text and "@import" not in text
    assert "nan" not in text.lower().replace("nanmu", "")
    return text


def test_whole_page_shows_all_parts_and_escapes_what_models_write(run: RunDirectory) -> None:
    text = written(run)
    for heading in ("What was run", "Curriculum", "Curves", "Evaluation", "Continuations", "Sessions", "reproduce"):
        assert heading in text
    assert "prefers-color-scheme: dark" in text
    assert "<b>비가" not in text and "&lt;b&gt;비가" in text and "&lt;x&gt;" in text
    assert "1.3750" in text and "deadline" in text
    assert drawn(text) == ["loss-on-the-text-trained 12", "bits-per-byte-of-the-text-trained 1"]
    # A picture of its own each, that is one.
    pictures = sorted(run.pictures.iterdir())
    assert [path.stem for path in pictures] == ["bits-per-byte-of-the-text-trained", "loss-on-the-text-trained"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_forgetting_matrix_stands_below_the_models(run: RunDirectory) -> None:
    assert "after each stage" not in written(run)
    evaluation = json.loads(run.evaluation.read_text())
    evaluation["forgetting"] = [
        {"after": "web-1", "step": 10, "tokens": 1, "bits_per_byte": {"web-1": 1.5, "wiki": 2.5, "all": 2.0}},
        {"after": "wiki", "step": 20, "tokens": 2, "bits_per_byte": {"web-1": 1.625, "wiki": 1.75, "all": 1.7}},
    ]
    write_json(run.evaluation, evaluation)
    text = written(run)
    assert "after each stage" in text and "+0.1250" in text and "1.6250" in text
    evaluation["forgetting"] = [{"after": 3}]
    write_json(run.evaluation, evaluation)
    assert "Damaged, so not in this report: evaluation.json" in written(run)


def test_baseline_adds_its_line(run: RunDirectory) -> None:
    write_metrics(run.part("baseline"), [metrics_line(step, "web-1", 0.0) for step in range(1, 21)])
    text = written(run)
    assert drawn(text) == ["loss-on-the-text-trained 123", "bits-per-byte-of-the-text-trained 13"]
    assert "without teacher" in text


def test_hidden_states_have_a_chart_of_their_own_where_they_are_compared(run: RunDirectory) -> None:
    assert "Hidden states" not in written(run)
    write_metrics(run, [metrics_line(step, "web-1", 3.0) | {"hidden": 1 / step} for step in range(1, 21)])
    page = written(run)
    assert "hidden-states-of-student-and-teacher 1" in drawn(page) and "1 - cosine" in page


def test_speed_memory_rate_held_out_text_and_budget_are_drawn_where_they_were_measured(run: RunDirectory) -> None:
    plan = json.loads(run.plan.read_text())
    write_json(run.plan, plan | {"predicted": {"tokens_per_second": 95.0, "memory_total_bytes": 2e9}})
    lines = []
    for step in range(1, 21):
        more = {"tokens_per_second": 100.0, "peak_memory_bytes": 10**9, "lr": 1e-3 / step, "grad_norm": 0.5}
        more |= {"loss_scale": 2.0**16, "hours_used": 5 * step, "hours_left": 5 * (20 - step)}
        if step % 10 == 0:
            more["bits_per_byte"] = {"web-1": 2.0, "wiki": 2.0 + 1 / step, "all": None}
        lines.append(metrics_line(step, "web-1", 3.0) | more)
    write_metrics(run, lines)
    ledger = run.ledger.read_text().replace('"seconds": 90.0', '"seconds": 360000.0')
    write_atomically(run.ledger, ledger)
    text = written(run)
    assert drawn(text)[2:] == [
        "bits-per-byte-of-held-out-text 12",
        "speed 12",
        "memory 12",
        "learning-rate 1",
        "gradient-norm 1",
        "loss-scale 1",
        "budget 12",
    ]
    assert len(list(run.pictures.iterdir())) == 9
    # Of what is not a number nothing is drawn, and the page is there.
    damaged = {"tokens_per_second": "x", "peak_memory_bytes": None, "hours_left": [], "bits_per_byte": [3], "lr": {}}
    write_metrics(run, [line | damaged for line in lines])
    write_json(run.plan, plan | {"predicted": [1]})
    assert not {"speed 1", "memory 1", "learning-rate 1", "budget 12"} & set(drawn(written(run)))


def test_a_plain_bf16_or_fp32_run_has_no_loss_scale_to_show(run: RunDirectory) -> None:
    write_metrics(run, [metrics_line(step, "web-1", 3.0) | {"loss_scale": 1.0} for step in range(1, 21)])
    assert "loss-scale 1" not in drawn(written(run))


def test_without_matplotlib_the_page_says_how_to_get_curves(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    text = written(run)
    assert "pip install matplotlib" in text and "<svg" not in text and "Continuations" in text
    assert not run.pictures.exists()


def test_scores_on_tasks_stand_beside_those_that_others_report(run: RunDirectory) -> None:
    score = {"accuracy": {"mean": 0.5, "std": None}, "macro_f1": {"mean": 0.625, "std": 0.01}}
    summary = [{"task": "wic", "best_test": score, "chosen_on_validation": score}]
    zero_shot = [{"task": "copa", "rows": 1000, "scores": {"accuracy": 0.5125, "macro_f1": 0.5}}]
    write_json(run.tasks, {"summary": summary, "zero_shot": zero_shot, "model": {"step": 12}})
    text = written(run)
    assert "KoBEST and NSMC" in text and "62.50 ± 1.00" in text and "51.25" in text and "65.60" in text
    assert "quoted, not measured here" in text and "Measured at step 12." in text
    write_json(run.tasks, {"summary": [3]})
    assert "Damaged, so not in this report: tasks.json" in written(run)


@pytest.mark.parametrize("gone", ["recipe", "plan", "metrics", "ledger", "evaluation"])
def test_what_a_run_lacks_is_named(run: RunDirectory, gone: str) -> None:
    path: Path = getattr(run, gone)
    path.unlink()
    text = written(run)
    assert "What is missing" in text and f"{path.name}" in text.split("What is missing")[1]


def test_a_run_that_has_not_begun_still_gives_a_page(tmp_path: Path) -> None:
    assert "index.json" in written(RunDirectory(tmp_path / "new"))


def test_a_spike_and_a_single_point_can_be_drawn(run: RunDirectory) -> None:
    write_metrics(run, [metrics_line(1, "web-1", math.nan), metrics_line(2, "web-1", 3.0)])
    assert "loss-on-the-text-trained 12" in drawn(written(run))


def test_a_last_step_of_a_few_tokens_is_not_drawn(run: RunDirectory) -> None:
    def last(tokens: int) -> float:
        lines = [metrics_line(step, "web-1", 3.0) for step in range(1, 21)]
        write_metrics(run, [*lines, {**metrics_line(21, "web-1", 9.0), "tokens": 20_000 + tokens}])
        [loss, *_] = curves.charts(run, {}, {}, [], 0)
        return loss.series[0].points[-1][0]

    assert last(tokens=499) == 20_000
    assert last(tokens=501) == 20_501


def test_names_stand_left_and_figures_right() -> None:
    cells = [["stage", "corpus", "tokens"], ["web-1", "web", "12"]]
    assert table(cells, num_left=2).count('class="name"') == 4
    assert '<td class="name">web</td><td>12</td>' in table(cells, num_left=2)


def test_many_points_are_thinned_and_both_ends_stay() -> None:
    points = [(float(x), 5 + math.sin(x / 50)) for x in range(1, 5001)]
    thinned = thin(points)
    assert len(thinned) <= MOST_POINTS + 1 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert thinned == sorted(thinned) and thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_a_chart_is_the_same_every_time_has_the_page_s_colours_and_shares_no_id_with_another(tmp_path: Path) -> None:
    def chart(title: str) -> Chart:
        spans = [Span("웹 <1>", 0, 2), Span("b", 2, 3)]
        return Chart(title, [Series("s <x>", [(1, 2.0), (3, 4.0)], 1), Series("none", [], 2)], "x", "y & z", spans)

    first, second = as_html(chart("One")), as_html(chart("Two"))
    assert first == as_html(chart("One"))
    assert "var(--c1)" in first and "var(--soft)" in first and "#0100" not in first and "none</span>" not in first
    assert "웹 &lt;1&gt;" in first and "y &amp; z" in first and "s &lt;x&gt;" in first
    own, other = ({*re.findall(r' id="([^"]*)"', page)} for page in (first, second))
    assert own and other and not own & other
    save_png(chart("One"), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (420, False), (420, True)])
@pytest.mark.skipif(browser() is None, reason="needs chromium")
def test_a_browser_finds_nothing_amiss(run: RunDirectory, width: int, dark: bool) -> None:
    written(run)
    found = look(run.report, width, dark)
    assert found["dark"] is dark
    assert [found[key] for key in ("faults", "requests", "console")] == [[], [], []]


def test_report_imports_nothing_that_trains() -> None:
    heavy = "{'torch', 'transformers', 'deepspeed', 'bitsandbytes', 'rich', 'matplotlib'}"
    code = f"import sys, daramgpt.report; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_what_was_not_read_whole_is_named(run: RunDirectory) -> None:
    text = written(run)
    assert "repeated document dropped" in text and "1,234" in text
    assert "Not read whole: 600" in text and "wiki: wiki.zip!&lt;499&gt;: is empty" in text
    assert "100 more in shards/index.json" in text and "&lt;500&gt;" not in text
