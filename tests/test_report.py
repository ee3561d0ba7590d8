"""report.html from complete, partial and empty runs: self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from daramgpt import recipe, report
from daramgpt.report.chart import MOST_POINTS, Series, Span, line_chart
from daramgpt.report.page import table
from daramgpt.run_directory import RunDirectory, write_atomically, write_json

VOID = {"meta", "link", "line", "rect", "polyline", "br", "i"}


class Checker(HTMLParser):
    """Finds unbalanced tags and addresses that a browser would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID - {"i"}:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def metrics_line(step: int, stage: str, kd: float) -> dict[str, object]:
    return {"step": step, "tokens": 1000 * step, "stage": stage, "loss": 5.0, "kd": kd, "ce": 6.0 - 0.01 * step}


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
    lines = [metrics_line(step, "web-1" if step <= 10 else "wiki", 3.0) for step in range(1, 21)]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
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
    assert text.count("<svg") == 2 and "1.3750" in text and "deadline" in text


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
    assert written(run).count("<polyline") == 3
    lines = [metrics_line(step, "web-1", 0.0) for step in range(1, 21)]
    write_atomically(run.part("baseline").metrics, "".join(json.dumps(line) + "\n" for line in lines))
    text = written(run)
    assert text.count("<polyline") == 5 and "without teacher" in text


def test_hidden_states_have_a_chart_of_their_own_where_they_are_compared(run: RunDirectory) -> None:
    assert "Hidden states" not in written(run)
    lines = [metrics_line(step, "web-1", 3.0) | {"hidden": 1 / step} for step in range(1, 21)]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    page = written(run)
    assert page.count("Hidden states of student and teacher") >= 1 and "1 - cosine" in page


@pytest.mark.parametrize("gone", ["recipe", "plan", "metrics", "ledger", "evaluation"])
def test_what_a_run_lacks_is_named(run: RunDirectory, gone: str) -> None:
    path: Path = getattr(run, gone)
    path.unlink()
    text = written(run)
    assert "What is missing" in text and f"{path.name}" in text.split("What is missing")[1]


def test_a_run_that_has_not_begun_still_gives_a_page(tmp_path: Path) -> None:
    assert "index.json" in written(RunDirectory(tmp_path / "new"))


def test_a_spike_and_a_single_point_can_be_drawn(run: RunDirectory) -> None:
    lines = [metrics_line(1, "web-1", math.nan), metrics_line(2, "web-1", 3.0)]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    assert "<polyline" in written(run)


def test_a_last_step_of_a_few_tokens_is_not_drawn(run: RunDirectory) -> None:
    def drawn(last_tokens: int) -> int:
        lines = [metrics_line(step, "web-1", 3.0) for step in range(1, 21)]
        lines.append({**metrics_line(21, "web-1", 9.0), "tokens": 20_000 + last_tokens})
        write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        points: str = written(run).split('points="')[1].split('"')[0]
        return len(points.split())

    assert drawn(last_tokens=499) == 20
    assert drawn(last_tokens=501) == 21


def test_names_stand_left_and_figures_right() -> None:
    cells = [["stage", "corpus", "tokens"], ["web-1", "web", "12"]]
    assert table(cells, num_left=2).count('class="name"') == 4
    assert '<td class="name">web</td><td>12</td>' in table(cells, num_left=2)


def test_chart_thins_its_points_and_keeps_them_inside() -> None:
    points = [(float(x), 5 + math.sin(x / 50)) for x in range(1, 5001)]
    chart = line_chart("t", [Series("s", points, 1)], [Span("a", 0, 2500), Span("b", 2500, 5000)], "x", "y")
    drawn = [tuple(map(float, pair.split(","))) for pair in chart.split('points="')[1].split('"')[0].split()]
    assert len(drawn) <= MOST_POINTS + 1
    assert all(52 <= x <= 546 and 34 <= y <= 276 for x, y in drawn)
    assert drawn[0][0] < 53 and drawn[-1][0] == 546


def test_report_imports_nothing_that_trains() -> None:
    heavy = "{'torch', 'transformers', 'deepspeed', 'bitsandbytes', 'rich'}"
    code = f"import sys, daramgpt.report; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_what_was_not_read_whole_is_named(run: RunDirectory) -> None:
    text = written(run)
    assert "repeated document dropped" in text and "1,234" in text
    assert "Not read whole: 600" in text and "wiki: wiki.zip!&lt;499&gt;: is empty" in text
    assert "100 more in shards/index.json" in text and "&lt;500&gt;" not in text
