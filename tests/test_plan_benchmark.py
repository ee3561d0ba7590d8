"""The benchmark of the plan's arithmetic: which rows there are, what is predicted of them, what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan
from daramgpt.planner import Timings, memory


def test_no_row_that_is_evidence_gave_a_constant() -> None:
    """Calibration has shapes of its own, and what is fitted says on which of them."""

    def shapes(of: str) -> set[tuple[Any, ...]]:
        return {(str(row.teacher), str(row.student), row.vocab_size) for row in plan.ROWS[of]}

    assert not shapes("calibration") & (shapes("small") | shapes("full"))
    calibration = {row.name.rpartition("-")[0] for row in plan.ROWS["calibration"]}
    for constant, rows in plan.FITTED_ON.items():
        assert hasattr(memory, constant.rpartition(".")[2])
        assert {name for name in calibration if name in rows}


@pytest.mark.parametrize("row", [row for rows in plan.ROWS.values() for row in rows], ids=lambda row: row.name)
def test_a_row_is_a_whole_training(row: plan.Row) -> None:
    step, recipe = row.step(), row.recipe()
    assert step.student.n_head == row.student.n_head and step.dtype == row.name.split("-")[1]
    assert (step.teacher is None) == (recipe.teacher is None) == (recipe.loss.kd_weight == 0)
    assert step.tokens % step.chunk_tokens == 0


def test_names_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[str] = []
    timings = Timings(2048, *[1e-3] * 6, 1e-9, 1e-9, 1e10, "here")
    monkeypatch.setattr(plan, "answer_of", lambda work, row, *_: answers(work, row))

    def answers(work: Any, row: plan.Row) -> Any:
        if work is plan._timings:
            return timings
        measured.append(row.name)
        return {"seconds": [1.0, 3.0, 2.0], "peak_memory_bytes": 10**9}

    assert plan.main(["--rows", "alone-fp32", "--steps", "3", "--json", str(tmp_path / "out.json")]) == 0
    assert measured == ["alone-fp32"]
    out = capsys.readouterr().out
    # The median of three steps of 4,096 tokens.
    assert "alone-fp32" in out and "2,048" in out and "1,000 MB" in out
    assert '"fitted_on"' in (tmp_path / "out.json").read_text()
    assert plan.main(["--rows", "alone-fp64"]) == 2
    assert "alone-fp64" in capsys.readouterr().err
    assert plan.main(["--steps", "0"]) == 2
