"""What all measurements share: how their commands end, and the processes of their sides."""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from benchmarks import command
from benchmarks.side_process import SideProcess
from daramgpt.errors import UserError


def test_a_result_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "result.json"
    assert command.run(lambda: {"rows": [1, 2]}, lambda result: f"rows: {result['rows']}", file, "small models") == 0
    heading, *table = capsys.readouterr().out.splitlines()
    assert heading.startswith("small models, ") and heading.endswith(" s") and table == ["rows: [1, 2]"]
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["rows"] == [1, 2] and {"hardware", "versions"} < written.keys()


def test_a_fault_of_the_user_is_one_line_and_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> dict[str, Any]:
        raise UserError("--rows: there is none", "give one")

    assert command.run(measure, str, tmp_path / "result.json") == 2
    captured = capsys.readouterr()
    assert captured.err == "--rows: there is none; give one\n" and not captured.out
    assert not list(tmp_path.iterdir())


def _serve(code: int, connection: Connection) -> None:
    connection.send(os.environ["MALLOC_TRIM_THRESHOLD_"])
    if connection.recv() == "die":
        os._exit(code)


def test_a_side_has_its_own_settings_and_is_named_when_it_dies() -> None:
    before = dict(os.environ)
    side = SideProcess("teacher", _serve, 7)
    assert dict(os.environ) == before
    assert int(side.receive()) > 2**30
    side.send("die")
    with pytest.raises(RuntimeError, match="the side teacher ended with exit code 7"):
        side.receive()
