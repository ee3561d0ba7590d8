"""What the record of a test run says, as the trial of a P100's packages reads it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.p100_set import format_result, read_outcome

RECORD = """<testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="test_good" />
<testcase classname="tests.test_a" name="test_bad[x]"><failure message="1 == 2">...</failure></testcase>
<testcase classname="tests.test_b" name="test_setup"><error message="fixture">...</error></testcase>
<testcase classname="tests.test_b" name="test_gpu"><skipped message="no GPU">...</skipped></testcase>
</testsuite></testsuites>"""


def test_what_failed_is_counted_and_named(tmp_path: Path) -> None:
    record = tmp_path / "tests.xml"
    record.write_text(RECORD)
    outcome = read_outcome(record)
    assert (outcome["passed"], outcome["failed"], outcome["skipped"]) == (1, 2, 1)
    assert outcome["failures"] == ["tests.test_a::test_bad[x]", "tests.test_b::test_setup"]
    result = {"versions": {"torch": "2.7.1"}, "kernels": ["sm_60"], "date": "today", "install_seconds": 1.0}
    lines = format_result({**result, "tests": outcome}).splitlines()
    assert lines[-2:] == outcome["failures"]
    assert any(line.split() == ["failed", "2"] for line in lines)
