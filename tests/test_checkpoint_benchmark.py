"""The benchmark of checkpoints: its phases are those of the real functions, and its account adds up."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.checkpoint
from benchmarks import checkpoint_sides, machine
from benchmarks.checkpoint_sides import LOADING, ORDERS, PASSES, RESUME_ROWS, SAVING, Phases
from daramgpt import checkpoint
from daramgpt.shards import Shards


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of the small shape, as it is read from its file, and the folder that it was measured in."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patched, socket.create_server(("127.0.0.1", 0)) as server:
        # As after a training in this process: its sides are ranks of their own.
        for name, value in (
            ("RANK", 0),
            ("WORLD_SIZE", 1),
            ("LOCAL_RANK", 0),
            ("MASTER_PORT", server.getsockname()[1]),
        ):
            patched.setenv(name, str(value))
        result = benchmarks.checkpoint.measure("small", 1, folder)
    machine.write_result(result, folder / "result.json")
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), folder


def test_bytes_are_those_of_the_files(measured: tuple[dict[str, Any], Path]) -> None:
    result, folder = measured
    saved = checkpoint.newest(folder / "run" / "checkpoints")
    assert saved is not None and result["checkpoint_bytes"] == sum(f.stat().st_size for f in saved.path.iterdir())
    tensors = [tensor for group in checkpoint.TENSOR_FILES for tensor in saved.tensors(group).values()]
    assert result["tensor_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # The moments of an optimizer that has moved.
    assert all(tensor.any() for tensor in saved.tensors("exp_avg_sq").values())
    # What is gathered is held twice, but no more often.
    assert 0 < result["save_peak_memory_bytes"] < 4 * result["tensor_bytes"]
    assert not (folder / "others").exists()


@pytest.mark.parametrize(("name", "watched"), [("save", SAVING), ("load", LOADING)])
def test_phases_are_all_there_and_sum_up(measured: tuple[dict[str, Any], Path], name: str, watched: Any) -> None:
    result, _ = measured
    rows = {row["name"]: row for row in result["rows"]}
    phases = {key.partition(": ")[2]: row["seconds"] for key, row in rows.items() if key.startswith(f"{name}: ")}
    assert set(phases) == {phase for *_, phase in watched} | {"rest"}
    assert all(seconds > 0 for seconds in phases.values())
    assert rows[name]["seconds"] == result[f"{name}_seconds"] == pytest.approx(sum(phases.values()))
    assert rows[name]["bytes"] == result["checkpoint_bytes"]


def test_other_ways_write_the_whole_state(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    rows = {row["name"]: row for row in result["rows"]}
    for name in {"torch.save", "DeepSpeed"} - result["left_out"].keys():
        assert rows[name]["bytes"] == rows[f"{name}, synced"]["bytes"] >= result["tensor_bytes"]
        assert rows[name]["seconds"] <= rows[f"{name}, synced"]["seconds"]
    assert "torch.save" in rows


def test_going_on_is_measured_at_both_ends_of_the_run(measured: tuple[dict[str, Any], Path]) -> None:
    result, folder = measured
    num_steps = PASSES * Shards(folder / "run" / "shards").num_rows // RESUME_ROWS
    for order in ORDERS:
        found = [one for one in result["resume"] if one["order"] == order]
        assert [one["step"] for one in found] == [0, num_steps // 2, num_steps - 1]
        assert result["resume_last_over_first"][order] == found[2]["seconds"] / found[0]["seconds"]
    assert num_steps > 10_000


def test_the_table_has_every_row(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    lines = benchmarks.checkpoint.format_result(result).splitlines()
    assert len(lines) == 1 + len(result["rows"]) + len(result["left_out"]) + 1 + len(ORDERS)
    assert lines[1].startswith("save ") and lines[2].startswith("  gather ")


def test_a_phase_inside_another_is_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    owner = SimpleNamespace()

    def inner() -> None:
        nonlocal now
        now += 1

    def outer() -> None:
        nonlocal now
        owner.inner()
        now += 2
        raise OSError("full")

    owner.inner, owner.outer = inner, outer
    phases = Phases(((owner, "inner", "hash"), (owner, "outer", "verify")))
    with phases.watching():
        owner.inner()
        with pytest.raises(OSError, match="full"):
            owner.outer()
        owner.inner()
    owner.inner()
    assert phases.seconds == {"hash": 2.0, "verify": 3.0}
    assert owner.inner is inner


def test_a_way_that_does_not_work_is_left_out_with_its_reason(tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        (tmp_path / "others" / "part").write_bytes(b"1")
        raise RuntimeError("no compiler\nand more")

    distiller: Any = SimpleNamespace(gather=lambda: {"weights": {}}, engine=SimpleNamespace(save_checkpoint=fail))
    rows, left_out = checkpoint_sides._other_ways(distiller, tmp_path / "others", 1)
    assert left_out == {"DeepSpeed": "no compiler"}
    assert [row["name"] for row in rows] == ["torch.save", "torch.save, synced"]
    assert not (tmp_path / "others").exists()


def test_no_repetition_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint", "--repetitions", "0"])
    assert benchmarks.checkpoint.main() == 2
    assert capsys.readouterr().err == "--repetitions 0 is too few; give 1 or more\n"
