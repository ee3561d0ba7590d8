"""The seeds benchmark's arithmetic."""

from __future__ import annotations

import pytest

from benchmarks import quickstart


def values(teacher: float, student: float, baseline: float) -> dict[str, float]:
    return {
        "teacher": teacher,
        "teacher int8": teacher * 1.001,
        "student": student,
        "student without teacher": baseline,
    }


def test_the_smallest_lead_and_the_largest_range_count() -> None:
    result = quickstart.summarise({0: values(1.0, 2.0, 3.0), 1: values(1.5, 2.5, 2.75)})
    assert result["gap"] == 0.25
    assert result["spread"] == 0.5
    assert result["int8_loss"] == pytest.approx(0.001)
    assert len(result["rows"]) == 8
    text = quickstart.format_result(result)
    assert "2.2500" in text and "lead of the distilled student 0.2500" in text


def test_a_student_that_is_behind_has_a_negative_lead() -> None:
    assert quickstart.summarise({0: values(1.0, 2.0, 1.5)})["gap"] == -0.5
