"""Copies outside of the machine: whole or not there, never lost in silence, and no training waits for one."""

from __future__ import annotations

import errno
import inspect
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from daramgpt import checkpoint, ledger
from daramgpt.errors import UserError
from daramgpt.persistence import DirectoryPlace, Hook, HubPlace, Persister, Place, fetch
from daramgpt.persistence.contents import Contents, gather, is_plain
from daramgpt.persistence.place import PlaceError, Target
from daramgpt.run_directory import RunDirectory

NAME = "tiny"
CHECKPOINT_FILES = [f"{group}.safetensors" for group in checkpoint.TENSOR_FILES] + ["state.json", "manifest.json"]


class FakeDistiller:
    """What `checkpoint.save` asks of an engine: tensors that depend on `step`."""

    rank = 0

    def __init__(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.groups = {
            group: {"transformer.ln_f.bias": torch.randn(5, generator=generator)}
            for group in ("weights", "exp_avg", "exp_avg_sq")
        }
        self.groups["rng"] = {"cpu": torch.randint(256, (40,), generator=generator, dtype=torch.uint8)}

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        return self.groups

    def any_rank(self, flag: bool) -> bool:
        return flag

    def loss_scaler(self) -> dict[str, Any]:
        return {}


def save(part: RunDirectory, step: int, keep: int = 9) -> Path:
    state = {"step": step, "tokens": 100 * step, "num_steps": 99}
    path = checkpoint.save(part.checkpoints, FakeDistiller(step), state, keep)  # type: ignore[arg-type]
    assert path is not None
    return path


def train(run: RunDirectory, *steps: int, machine: str = "A", part: str = "") -> Path:
    """What a session leaves: a plan, its checkpoints, its lines of metrics, and of the ledger but the last."""
    here = run.part(part) if part else run
    here.path.mkdir(parents=True, exist_ok=True)
    if not here.plan.exists():
        here.plan.write_text(json.dumps({"num_steps": 99, "made_by": machine}))
    run.recipe.write_text('name = "tiny"\n')
    book = ledger.Ledger(run.ledger)
    book.start(part or "student", machine, 0, 0)
    for step in steps:
        path = save(here, step)
        with here.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "machine": machine}) + "\n")
        book.beat(step, 100 * step, float(step))
    return path


def newest_step(run: RunDirectory) -> int | None:
    saved = checkpoint.newest(run.checkpoints)
    return saved.state["step"] if saved else None


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def copied(place: Target, run: RunDirectory, *paths: Path, keep: int = 2) -> None:
    for path in paths:
        place.copy(gather(run, path), keep)


def fetched(places: list[Target], run: RunDirectory) -> str:
    """The one line of a fetch."""
    lines: list[str] = []
    fetch(places, run, lines.append)
    assert len(lines) == 1 and "\n" not in lines[0]
    return lines[0]


# What a fake hub has for a commit, and a repository by its name.
Tree = dict[str, bytes]


class FakeHub:
    """The hub in memory, with the calls of `huggingface_hub.HfApi` that copies need."""

    repositories: dict[str, Tree]
    fault: Exception | None
    log: list[str]

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self._answer("create_repo")
        assert private and exist_ok
        self.repositories.setdefault(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})

    def list_repo_files(self, repo_id: str) -> list[str]:
        self._answer("list_repo_files")
        return list(self.repositories[repo_id])

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        self._answer("create_commit")
        tree = dict(self.repositories[repo_id])
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                assert not operation.is_folder
                del tree[operation.path_in_repo]
            else:
                with operation.as_file() as file:
                    tree[operation.path_in_repo] = file.read()
        self._answer("end of create_commit")
        self.repositories[repo_id] = tree
        self.log.append(commit_message)

    def super_squash_history(self, repo_id: str) -> None:
        self._answer("super_squash_history")
        self.log.append("squashed")

    def snapshot_download(self, repo_id: str, *, local_dir: Any = None, allow_patterns: Any = None) -> str:
        self._answer("snapshot_download")
        names = huggingface_hub.utils.filter_repo_objects(self.repositories[repo_id], allow_patterns=allow_patterns)
        for name in names:
            file = Path(local_dir) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.repositories[repo_id][name])
        return str(local_dir)

    def _answer(self, call: str) -> None:
        if self.fault is not None and getattr(self.fault, "call", call) == call:
            raise self.fault


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.repositories, FakeHub.fault, FakeHub.log = {}, None, []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "a" / NAME)


@pytest.fixture
def other(tmp_path: Path) -> RunDirectory:
    """The same run on another machine, whose disk is empty."""
    return RunDirectory(tmp_path / "b" / NAME)


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    path = tmp_path / "drive"
    path.mkdir()
    return path


class Medium:
    """A place of either kind, and its files to damage."""

    def __init__(self, place: Place, drive: Path | None) -> None:
        self.place, self.drive = place, drive

    def read(self, name: str) -> bytes:
        if self.drive is not None:
            return (self.drive / NAME / name).read_bytes()
        return FakeHub.repositories["me/copies"][f"{NAME}/{name}"]

    def write(self, name: str, data: bytes | None) -> None:
        if self.drive is None and data is None:
            del FakeHub.repositories["me/copies"][f"{NAME}/{name}"]
        elif self.drive is None:
            assert data is not None
            FakeHub.repositories["me/copies"][f"{NAME}/{name}"] = data
        elif data is None:
            (self.drive / NAME / name).unlink()
        else:
            (self.drive / NAME / name).write_bytes(data)


@pytest.fixture(params=["directory", "hub"])
def medium(request: pytest.FixtureRequest, hub: type[FakeHub], drive: Path) -> Medium:
    if request.param == "directory":
        return Medium(DirectoryPlace(drive), drive)
    return Medium(HubPlace("me/copies"), None)


def test_the_fake_hub_takes_what_the_real_one_takes() -> None:
    for name, method in inspect.getmembers(FakeHub, inspect.isfunction):
        if name.startswith("_"):
            continue
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        for parameter in inspect.signature(method).parameters.values():
            assert parameter.name in real, (name, parameter.name)
            assert real[parameter.name].kind == parameter.kind, (name, parameter.name)
        required = {key for key, value in real.items() if value.default is inspect.Parameter.empty}
        assert required <= set(inspect.signature(method).parameters), name


def test_a_place_looks_like_the_run_directory(run: RunDirectory, medium: Medium) -> None:
    path = train(run, 5, 10)
    (run.shards / "index.json").parent.mkdir()
    (run.shards / "index.json").write_text("{}")
    copied(medium.place, run, path)
    names = medium.place.files(NAME)
    step = {f"checkpoints/step-00000010/{name}" for name in CHECKPOINT_FILES}
    assert names == {"recipe.toml", "plan.json", "ledger.jsonl", "metrics.jsonl", "manifest.json"} | step
    for name in names - {"manifest.json"}:
        assert medium.read(name) == (run.path / name).read_bytes()


def test_a_line_that_is_being_written_is_not_copied(run: RunDirectory, medium: Medium) -> None:
    path = train(run, 5)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    copied(medium.place, run, path)
    assert medium.read("metrics.jsonl") == b'{"step": 5, "machine": "A"}\n'


def test_the_newest_of_each_training_are_kept(run: RunDirectory, medium: Medium) -> None:
    train(run, 5, 10, 15)
    train(run, 7, part="teacher")
    copied(medium.place, run, run.part("teacher").checkpoints / "step-00000007")
    copied(medium.place, run, *(run.checkpoints / f"step-{step:08d}" for step in (5, 10, 15)))
    steps = {name.rpartition("/")[0] for name in medium.place.files(NAME) if name.endswith("state.json")}
    kept = {"checkpoints/step-00000010", "checkpoints/step-00000015", "parts/teacher/checkpoints/step-00000007"}
    assert steps == kept


def test_what_was_just_copied_stays_though_the_place_has_newer_ones(run: RunDirectory, medium: Medium) -> None:
    train(run, 5, 20, 30)
    copied(medium.place, run, *(run.checkpoints / f"step-{step:08d}" for step in (20, 30, 5)))
    steps = {name.split("/")[1] for name in medium.place.files(NAME) if name.endswith("state.json")}
    assert steps == {"step-00000005", "step-00000020", "step-00000030"}


def test_two_machines_take_turns(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    copied(medium.place, run, train(run, 5, 10, machine="A"))
    # A goes on alone, and its last steps are in no copy.
    save(run, 12)
    assert "step-00000010 from" in fetched([medium.place], other)
    assert newest_step(other) == 10
    assert contents_of(other.checkpoints / "step-00000010") == contents_of(run.checkpoints / "step-00000010")
    assert json.loads(other.plan.read_text())["made_by"] == "A"
    other.plan.write_text(json.dumps({"num_steps": 99, "made_by": "B"}))
    copied(medium.place, other, train(other, 15, 20, machine="B"))
    line = fetched([medium.place], run)
    assert "checkpoints/step-00000020 from" in line and "passed over" not in line
    assert newest_step(run) == 20 and (run.checkpoints / "latest").read_text() == "step-00000020\n"
    # The plan of the newer checkpoint comes with it, and its metrics.
    assert json.loads(run.plan.read_text())["made_by"] == "B"
    assert [entry["step"] for entry in ledger.entries(run.metrics)] == [5, 10, 15, 20]
    assert {session.machine for session in ledger.sessions(run.ledger)} == {"A", "B"}
    assert ledger.seconds_used(run.ledger) == 30.0
    before = contents_of(run.path)
    assert fetched([medium.place], run).startswith("copies: nothing newer in")
    assert contents_of(run.path) == before


def test_a_session_that_ended_after_its_last_copy_is_not_taken_for_dead(
    run: RunDirectory, other: RunDirectory, medium: Medium
) -> None:
    path = train(run, 5)
    copied(medium.place, run, path)
    session = ledger.sessions(run.ledger)[0]
    last = {"event": "end", "session": next(ledger.entries(run.ledger))["session"], "time": session.ended + 1}
    with run.ledger.open("a") as file:
        file.write(json.dumps({**last, "step": 5, "tokens": 500, "seconds": 60.0, "reason": "deadline"}) + "\n")
    fetched([medium.place], other)
    # The other machine has no end of the first session, and writes one.
    copied(medium.place, other, train(other, 10, machine="B"))
    assert ledger.sessions(other.ledger)[0].reason == "died"
    fetched([medium.place], run)
    first, second = ledger.sessions(run.ledger)
    assert (first.reason, first.seconds, second.machine) == ("deadline", 60.0, "B")


def test_a_run_may_have_any_name(tmp_path: Path, medium: Medium) -> None:
    run, other = (RunDirectory(tmp_path / machine / "[a-b] *?") for machine in "ab")
    copied(medium.place, run, train(run, 10))
    fetched([medium.place], other)
    assert newest_step(other) == 10


def test_what_is_here_and_as_new_stays(run: RunDirectory, medium: Medium) -> None:
    copied(medium.place, run, train(run, 5, 10))
    run.plan.write_text('{"mine": 1}')
    run.metrics.write_text('{"step": 10, "mine": 1}\n')
    before = contents_of(run.path)
    fetched([medium.place], run)
    assert contents_of(run.path) == before


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(run: RunDirectory, medium: Medium) -> None:
    copied(medium.place, run, train(run, 5, 10))
    (run.checkpoints / "step-00000010" / "weights.safetensors").write_bytes(b"")
    line = fetched([medium.place], run)
    assert "brought checkpoints/step-00000010" in line and "weights.safetensors is not what was written" in line
    assert newest_step(run) == 10


def test_parts_come_and_go_with_what_they_exported(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    teacher = train(run, 7, part="teacher")
    export = run.part("teacher").export
    export.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "export.json"):
        (export / name).write_bytes(name.encode() * 100)
    run.part("baseline").path.mkdir()
    run.part("baseline").plan.write_text('{"num_steps": 3}')
    copied(medium.place, run, teacher, train(run, 5))
    fetched([medium.place], other)
    assert contents_of(other.part("teacher").export) == contents_of(export)
    assert newest_step(other.part("teacher")) == 7 and newest_step(other) == 5
    assert other.part("baseline").plan.read_text() == '{"num_steps": 3}'
    assert other.recipe.read_text() == run.recipe.read_text()
    (export / "model.safetensors").write_bytes(b"another")
    (export / "tokenizer.json").unlink()
    copied(medium.place, run, save(run, 6))
    shutil.rmtree(other.path)
    fetched([medium.place], other)
    assert contents_of(other.part("teacher").export) == contents_of(export)


def test_an_export_that_does_not_verify_is_not_brought(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    teacher = train(run, 7, part="teacher")
    run.part("teacher").export.mkdir()
    (run.part("teacher").export / "model.safetensors").write_bytes(b"weights" * 9)
    copied(medium.place, run, teacher)
    medium.write("parts/teacher/export/model.safetensors", b"weightt" * 9)
    line = fetched([medium.place], other)
    assert "parts/teacher/export: model.safetensors is not what was written" in line
    assert not other.part("teacher").export.exists() and newest_step(other.part("teacher")) == 7


def truncated(data: bytes) -> bytes:
    return data[:-2]


def emptied(_: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def removed(_: bytes) -> None:
    return None


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_copy_is_passed_over(
    run: RunDirectory, other: RunDirectory, medium: Medium, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    train(run, 5, 10)
    copied(medium.place, run, run.checkpoints / "step-00000005", run.checkpoints / "step-00000010")
    file = f"checkpoints/step-00000010/{name}"
    medium.write(file, damage(medium.read(file)))
    line = fetched([medium.place], other)
    assert "brought checkpoints/step-00000005" in line
    assert "passed over" in line and "step-00000010: " in line
    assert newest_step(other) == 5
    assert [path.name for path in other.checkpoints.glob("step-*")] == ["step-00000005"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("plan.json", damage) for damage in (truncated, emptied, flipped, removed)),
        *(("manifest.json", damage) for damage in (truncated, emptied, removed)),
    ],
)
def test_a_checkpoint_without_the_plan_that_it_was_trained_by_is_passed_over(
    run: RunDirectory, other: RunDirectory, medium: Medium, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    copied(medium.place, run, train(run, 10))
    medium.write(name, damage(medium.read(name)))
    train(other, 5, machine="B")
    before = contents_of(other.checkpoints), other.plan.read_bytes(), other.metrics.read_bytes()
    line = fetched([medium.place], other)
    assert "plan.json" in line and "passed over" in line
    assert (contents_of(other.checkpoints), other.plan.read_bytes(), other.metrics.read_bytes()) == before
    shutil.rmtree(other.path)
    with pytest.raises(UserError, match="none of these checkpoints of tiny verifies"):
        fetch([medium.place], other, lambda _: None)
    assert newest_step(other) is None


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_the_manifest_of_small_files_brings_what_was_not_written(
    run: RunDirectory, other: RunDirectory, drive: Path, bit: int
) -> None:
    copied(DirectoryPlace(drive), run, train(run, 10))
    manifest = drive / NAME / "manifest.json"
    good = manifest.read_bytes()
    for at in range(0, len(good), 37):
        data = bytearray(good)
        data[at] ^= 1 << bit
        manifest.write_bytes(data)
        try:
            fetch([DirectoryPlace(drive)], other, lambda _: None)
        except UserError:
            assert not other.checkpoints.exists()
        else:
            assert other.plan.read_bytes() == run.plan.read_bytes()
        shutil.rmtree(other.path)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, removed])
@pytest.mark.parametrize("name", ["recipe.toml", "ledger.jsonl", "metrics.jsonl"])
def test_a_damaged_small_file_is_passed_over(
    run: RunDirectory, other: RunDirectory, medium: Medium, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    copied(medium.place, run, train(run, 10))
    medium.write(name, damage(medium.read(name)))
    line = fetched([medium.place], other)
    assert newest_step(other) == 10 and f"{name}: is " in line
    assert not (other.path / name).exists()


def test_of_two_places_the_newest_that_verifies_wins(
    run: RunDirectory, other: RunDirectory, drive: Path, hub: type[FakeHub]
) -> None:
    first, second = DirectoryPlace(drive), HubPlace("me/copies")
    copied(first, run, train(run, 5))
    copied(second, run, save(run, 10))
    assert "step-00000010 from huggingface.co/me/copies" in fetched([first, second], other)
    shutil.rmtree(other.path)
    name = f"{NAME}/checkpoints/step-00000010/rng.safetensors"
    hub.repositories["me/copies"][name] = flipped(hub.repositories["me/copies"][name])
    line = fetched([first, second], other)
    assert f"step-00000005 from {drive}" in line and "rng.safetensors is not what was written" in line


def test_where_no_copy_verifies_nothing_begins_afresh(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    copied(medium.place, run, train(run, 10))
    medium.write("checkpoints/step-00000010/weights.safetensors", b"")
    with pytest.raises(UserError, match="none of these checkpoints") as caught:
        fetch([medium.place], other, lambda _: None)
    assert "step-00000010" in caught.value.fault


def test_a_place_that_is_empty_is_fine(other: RunDirectory, medium: Medium) -> None:
    assert "nothing of tiny in" in fetched([medium.place], other)
    assert contents_of(other.path) == {}


def unreachable(medium: Medium) -> None:
    if medium.drive is not None:
        shutil.rmtree(medium.drive)
    else:
        FakeHub.fault = ConnectionError("no route to host\nsecond line")


def test_an_unreachable_place_is_said_and_where_nothing_is_here_an_error(
    run: RunDirectory, other: RunDirectory, medium: Medium, tmp_path: Path
) -> None:
    copied(medium.place, run, train(run, 10))
    unreachable(medium)
    line = fetched([medium.place], run)
    assert f"{medium.place.name} cannot be read: " in line and "second line" not in line
    with pytest.raises(UserError, match="cannot be reached"):
        fetch([medium.place], other, lambda _: None)
    # Another place that can be read and has nothing says nothing about this one.
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match="cannot be reached"):
        fetch([DirectoryPlace(tmp_path / "second"), medium.place], other, lambda _: None)


def test_a_place_that_is_lost_while_it_is_read(
    run: RunDirectory, other: RunDirectory, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = HubPlace("me/copies")
    copied(place, run, train(run, 7, part="teacher"), train(run, 10))
    calls: list[str] = []
    original = FakeHub.snapshot_download

    def breaks(self: FakeHub, *args: Any, **kwargs: Any) -> str:
        calls.append("")
        if len(calls) > 2:
            raise ConnectionError("reset by peer")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FakeHub, "snapshot_download", breaks)
    # The run's checkpoint was brought and the teacher's was not: it must not be trained anew in silence.
    with pytest.raises(UserError, match="reset by peer"):
        fetch([place], other, lambda _: None)
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    fetched([place], other)
    assert newest_step(other.part("teacher")) == 7


def test_without_a_token_the_hub_is_not_taken_for_empty(
    run: RunDirectory, other: RunDirectory, hub: type[FakeHub]
) -> None:
    copied(HubPlace("me/copies"), run, train(run, 10))
    hub.fault = PermissionError("401 Client Error: Unauthorized")
    hub.fault.call = "create_repo"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="401"):
        fetch([HubPlace("me/copies")], other, lambda _: None)


def test_a_full_disk_here_is_not_the_place_that_is_lost(
    run: RunDirectory, other: RunDirectory, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(DirectoryPlace(drive), run, train(run, 10))

    def fills(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fills)
    with pytest.raises(UserError, match="make room"):
        fetch([DirectoryPlace(drive)], other, lambda _: None)
    monkeypatch.undo()
    fetched([DirectoryPlace(drive)], other)
    assert newest_step(other) == 10 and not list(other.path.glob(".fetched"))


class Killed(BaseException):
    """Ends what runs as a kill does: nothing cleans up behind it."""


def counting(original: Callable[..., Any], last: int) -> Callable[..., Any]:
    """As `original`, until its `last` call, in which the process is killed."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == last:
            raise Killed
        return original(*args, **kwargs)

    return call


KILLS: list[tuple[Any, str]] = [(os, "replace"), (os, "fsync"), (shutil, "copyfileobj"), (shutil, "rmtree")]
KILLS += [(Path, "rename"), (Path, "mkdir")]


@pytest.mark.parametrize(("owner", "name"), KILLS, ids=[name for _, name in KILLS])
def test_a_kill_while_copying_leaves_whole_copies(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    train(run, 5, 10, 15)
    steps = [run.checkpoints / f"step-{step:08d}" for step in (5, 10, 15)]
    ended = 0
    for last in range(1, 60):
        drive = tmp_path / f"drive{last}"
        drive.mkdir()
        copied(DirectoryPlace(drive), run, *steps[:2])
        run.metrics.write_text(f'{{"step": 15, "kill": {last}}}\n')
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counting(getattr(owner, name), last))
            try:
                copied(DirectoryPlace(drive), run, steps[2])
                ended += 1
            except Killed:
                pass
        there = RunDirectory(tmp_path / f"b{last}" / NAME)
        line = fetched([DirectoryPlace(drive)], there)
        assert "passed over" not in line, (last, line)
        assert newest_step(there) in (10, 15)
        assert all(checkpoint.fault(path) is None for path in (drive / NAME).glob("checkpoints/step-*"))
        copied(DirectoryPlace(drive), run, steps[2])
        assert not list((drive / NAME).rglob(".*"))
        assert sorted(path.name for path in (drive / NAME / "checkpoints").iterdir()) == [
            "step-00000010",
            "step-00000015",
        ]
        fetched([DirectoryPlace(drive)], there)
        assert newest_step(there) == 15 and there.metrics.read_bytes() != b""
        if ended:
            break
    assert ended and last > 1, "the kill never struck, or always"


@pytest.mark.parametrize(("owner", "name"), KILLS, ids=[name for _, name in KILLS])
def test_a_kill_while_fetching_leaves_a_run_that_can_be_fetched(
    run: RunDirectory, tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    copied(DirectoryPlace(drive), run, train(run, 7, part="teacher"), train(run, 10))
    for last in range(1, 60):
        there = RunDirectory(tmp_path / f"b{last}" / NAME)
        save(there, 3)
        struck = False
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counting(getattr(owner, name), last))
            try:
                fetch([DirectoryPlace(drive)], there, lambda _: None)
            except Killed:
                struck = True
        assert newest_step(there) in (3, 10)
        assert all(checkpoint.fault(path) is None for path in there.path.rglob("step-*") if ".fetched" not in str(path))
        fetched([DirectoryPlace(drive)], there)
        assert newest_step(there) == 10 and newest_step(there.part("teacher")) == 7
        assert not (there.path / ".fetched").exists()
        if not struck:
            break
    assert not struck and last > 1


def test_what_a_killed_fetch_left_is_cleared(run: RunDirectory, other: RunDirectory, drive: Path) -> None:
    path = train(run, 10)
    copied(DirectoryPlace(drive), run, path)
    half = other.path / ".fetched" / "0" / step(10)
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half of it")
    fetched([DirectoryPlace(drive)], other)
    assert newest_step(other) == 10 and not (other.path / ".fetched").exists()


def test_what_a_killed_copy_left_is_no_copy_and_is_cleared(run: RunDirectory, other: RunDirectory, drive: Path) -> None:
    path = train(run, 10)
    copied(DirectoryPlace(drive), run, path)
    shutil.copytree(path, drive / NAME / "checkpoints" / ".step-00000015.tmp")
    (drive / NAME / ".plan.json.tmp").write_text("{")
    fetched([DirectoryPlace(drive)], other)
    assert newest_step(other) == 10
    copied(DirectoryPlace(drive), run, path)
    assert not list((drive / NAME).rglob(".*"))


@pytest.mark.parametrize("call", ["create_commit", "end of create_commit"])
def test_a_fault_while_committing_leaves_the_state_before_or_after(
    run: RunDirectory, other: RunDirectory, hub: type[FakeHub], call: str
) -> None:
    place = HubPlace("me/copies")
    train(run, 5, 10, 15)
    copied(place, run, run.checkpoints / "step-00000005", run.checkpoints / "step-00000010")
    hub.fault = RuntimeError("storage backend")
    hub.fault.call = call  # type: ignore[attr-defined]
    with pytest.raises(PlaceError, match="RuntimeError: storage backend"):
        copied(place, run, run.checkpoints / "step-00000015")
    hub.fault = None
    assert "passed over" not in fetched([place], other)
    assert newest_step(other) == 10


def test_a_history_that_cannot_be_dropped_does_not_undo_the_copy(
    run: RunDirectory, other: RunDirectory, hub: type[FakeHub]
) -> None:
    place = HubPlace("me/copies")
    train(run, 5, 10, 15)
    hub.fault = PermissionError("403 Forbidden")
    hub.fault.call = "super_squash_history"  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="it grows: PermissionError: 403"):
        copied(place, run, *(run.checkpoints / f"step-{step:08d}" for step in (5, 10, 15)))
    fetched([place], other)
    assert newest_step(other) == 15


def test_a_copy_on_the_hub_is_one_commit_and_its_history_goes_only_where_all_is_copies(
    run: RunDirectory, hub: type[FakeHub]
) -> None:
    place = HubPlace("me/copies")
    for step in (5, 10, 15):
        copied(place, run, train(run, step))
    steps = [f"tiny: checkpoints/step-{step:08d}" for step in (5, 10, 15)]
    assert hub.log == [*steps, "squashed"]
    hub.repositories["me/copies"]["essay.md"] = b"of somebody's own"
    copied(place, run, train(run, 20))
    assert hub.log[4:] == ["tiny: checkpoints/step-00000020"]
    assert hub.repositories["me/copies"]["essay.md"] == b"of somebody's own"


def test_small_files_that_a_machine_lacks_stay_in_the_place(
    run: RunDirectory, other: RunDirectory, medium: Medium, tmp_path: Path
) -> None:
    copied(medium.place, run, train(run, 7, part="teacher"))
    copied(medium.place, other, train(other, 5, machine="B"))
    third = RunDirectory(tmp_path / "c" / NAME)
    assert "passed over" not in fetched([medium.place], third)
    assert third.part("teacher").plan.read_bytes() == run.part("teacher").plan.read_bytes()


def test_a_damaged_checkpoint_is_not_copied_over_a_good_one(run: RunDirectory, medium: Medium) -> None:
    train(run, 5, 10)
    copied(medium.place, run, run.checkpoints / "step-00000005")
    before = {name: medium.read(name) for name in medium.place.files(NAME) if name.startswith("checkpoints")}
    (run.checkpoints / "step-00000010" / "exp_avg.safetensors").write_bytes(b"")
    with pytest.raises(PlaceError, match=r"exp_avg\.safetensors is not what was written"):
        copied(medium.place, run, run.checkpoints / "step-00000010", keep=1)
    assert {name: medium.read(name) for name in medium.place.files(NAME) if name.startswith("checkpoints")} == before


def test_a_copy_that_was_damaged_in_the_place_is_made_anew(run: RunDirectory, medium: Medium) -> None:
    path = train(run, 10)
    copied(medium.place, run, path)
    medium.write("checkpoints/step-00000010/weights.safetensors", b"")
    copied(medium.place, run, path)
    assert medium.read("checkpoints/step-00000010/weights.safetensors") == (path / "weights.safetensors").read_bytes()


def test_a_drive_that_comes_back_as_another_file_system_is_not_written_to(
    run: RunDirectory, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = DirectoryPlace(drive)
    path = train(run, 10)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda folder: folder in (drive, Path("/")))
        copied(place, run, path)
    shutil.rmtree(drive / NAME)
    with pytest.raises(PlaceError, match="is gone"):
        copied(place, run, path)
    assert list(drive.iterdir()) == []


def test_a_drive_that_is_not_there_is_not_made(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copied(DirectoryPlace(tmp_path / "mnt"), run, train(run, 10))
    assert not (tmp_path / "mnt").exists()


def test_a_full_drive_leaves_the_copies_before_and_its_room(
    run: RunDirectory, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run, 5, 10)
    copied(DirectoryPlace(drive), run, run.checkpoints / "step-00000005")

    def fills(reader: Any, writer: Any, *_: Any) -> None:
        writer.write(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", fills)
        with pytest.raises(OSError, match="No space left"):
            copied(DirectoryPlace(drive), run, run.checkpoints / "step-00000010")
    assert [path.name for path in (drive / NAME / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\\..\\b", "a/./b", "x\0"])
def test_names_that_leave_the_place_are_refused(
    run: RunDirectory, other: RunDirectory, drive: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not is_plain(name)
    place = HubPlace("me/copies")
    copied(place, run, train(run, 10))
    for there in (place, DirectoryPlace(drive)):
        with pytest.raises(PlaceError, match="is no file of the run"):
            there.bring(NAME, [name], other.path / "into")
    original = HubPlace.files
    monkeypatch.setattr(HubPlace, "files", lambda self, run: original(self, run) | {name})
    assert f"{name!r}: is no name of a file of the run" in fetched([place], other)
    assert newest_step(other) == 10


@pytest.mark.parametrize("name", ["../stolen", "/etc/passwd", "sub/file", "..", "manifest.json"])
def test_a_manifest_that_names_files_elsewhere_is_refused(
    run: RunDirectory, other: RunDirectory, drive: Path, name: str
) -> None:
    path = train(run, 10)
    copied(DirectoryPlace(drive), run, path)
    copy = drive / NAME / "checkpoints" / path.name / "manifest.json"
    manifest = json.loads(copy.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    del manifest["sha256"]
    manifest["sha256"] = checkpoint._sha256_of(manifest)
    copy.write_text(json.dumps(manifest))
    lines: list[str] = []
    with pytest.raises(UserError):
        fetch([DirectoryPlace(drive)], other, lines.append)
    assert f"names {name!r}" in lines[0]
    shutil.copy(copy, path / "manifest.json")
    with pytest.raises(ValueError, match="which is no file of its folder"):
        gather(run, path)


def test_links_in_a_place_are_not_followed(run: RunDirectory, other: RunDirectory, drive: Path, tmp_path: Path) -> None:
    path = train(run, 10)
    copied(DirectoryPlace(drive), run, path)
    shutil.move(drive / NAME / "checkpoints", tmp_path / "elsewhere")
    (drive / NAME / "checkpoints").symlink_to(tmp_path / "elsewhere")
    weights = tmp_path / "recipe.toml"
    shutil.move(drive / NAME / "recipe.toml", weights)
    (drive / NAME / "recipe.toml").symlink_to(weights)
    fetched([DirectoryPlace(drive)], other)
    assert newest_step(other) is None and not other.recipe.exists()


def test_files_that_no_manifest_names_are_not_brought(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    copied(medium.place, run, train(run, 10))
    medium.write("checkpoints/step-00000010/optimizer.pt", b"\x80\x04.")
    fetched([medium.place], other)
    assert sorted(path.name for path in (other.checkpoints / "step-00000010").iterdir()) == sorted(CHECKPOINT_FILES)


def test_nothing_is_unpickled(
    run: RunDirectory, other: RunDirectory, medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = train(run, 10)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    copied(medium.place, run, path)
    fetched([medium.place], other)
    assert newest_step(other) == 10


class Slow(Place):
    """A place whose copies wait until they may go on, and that can be told what to fail with."""

    def __init__(self, name: str = "slow") -> None:
        self.name = name
        self.taken: list[str] = []
        self.begun: list[str] = []
        self.may_go_on = threading.Event()
        self.fault: Exception | None = None

    def copy(self, contents: Contents, keep: int) -> None:
        title = contents.checkpoint.name if contents.checkpoint else "records"
        self.begun.append(title)
        assert self.may_go_on.wait(30)
        if self.fault is not None:
            raise self.fault
        self.taken.append(title)

    def files(self, run: str) -> set[str]:
        return set()

    def bring(self, run: str, names: Any, into: Path) -> Path:
        raise AssertionError


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def slow() -> Iterator[Slow]:
    place = Slow()
    yield place
    place.may_go_on.set()


def step(number: int, prefix: str = "") -> str:
    return f"{prefix}checkpoints/step-{number:08d}"


def test_training_does_not_wait_and_a_newer_checkpoint_replaces_the_one_that_waits(
    run: RunDirectory, slow: Slow
) -> None:
    lines: list[str] = []
    persister = Persister([slow], run, 2, lines.append)
    assert persister.busy_with() is None and persister.longest_seconds == 0
    persister.submit(train(run, 5))
    until(lambda: slow.begun == [step(5)])
    persister.submit(train(run, 7, part="teacher"))
    for number in (10, 15, 20):
        persister.submit(save(run, number))
    # What is being copied stays, though only two are kept.
    assert persister.busy_with() == run.checkpoints / "step-00000005"
    checkpoint.prune(run.checkpoints, 2, persister.busy_with())
    slow.may_go_on.set()
    assert persister.finish(30)
    # The teacher's was not replaced by the student's.
    assert slow.taken == [step(5), step(7, "parts/teacher/"), step(20), "records"]
    assert persister.busy_with() is None and persister.longest_seconds > 0
    copied_in = [line for line in lines if not line.startswith("waiting for")]
    assert len(copied_in) == 1 and f"{step(5)} copied in" in copied_in[0]


def test_a_fault_is_said_and_tried_again_at_the_next_save(run: RunDirectory, slow: Slow) -> None:
    lines: list[str] = []
    slow.may_go_on.set()
    persister = Persister([slow], run, 2, lines.append)
    slow.fault = OSError(errno.ENOSPC, "No space left on device")
    persister.submit(train(run, 7, part="teacher"))
    until(lambda: len(lines) == 1)
    assert "slow: parts/teacher/checkpoints/step-00000007 could not be copied: " in lines[0]
    assert "No space left on device" in lines[0] and "\n" not in lines[0]
    slow.fault = None
    persister.submit(train(run, 5))
    assert persister.finish(30)
    assert sorted(slow.taken[:2]) == [step(5), step(7, "parts/teacher/")]


def test_not_even_a_fault_of_ours_ends_the_thread(run: RunDirectory, slow: Slow) -> None:
    lines: list[str] = []
    slow.may_go_on.set()
    slow.fault = KeyError("key")
    persister = Persister([slow], run, 2, lines.append)
    persister.submit(train(run, 5))
    until(lambda: len(lines) == 1)
    assert "KeyError" in lines[0]
    slow.fault = None
    persister.submit(save(run, 10))
    assert persister.finish(30) and step(10) in slow.taken


def test_at_the_end_what_failed_is_tried_once_more_and_what_is_lost_is_said(run: RunDirectory, slow: Slow) -> None:
    lines: list[str] = []
    slow.may_go_on.set()
    slow.fault = PlaceError("gone")
    persister = Persister([slow], run, 2, lines.append)
    persister.submit(train(run, 5))
    until(lambda: len(lines) == 1)
    assert not persister.finish(30)
    assert slow.begun == [step(5), step(5), "records"]
    assert lines[-2:] == [f"not copied to slow: {step(5)}", "not copied to slow: ledger and metrics"]


def test_a_copy_that_takes_too_long_at_the_end_is_said(run: RunDirectory, slow: Slow) -> None:
    lines: list[str] = []
    persister = Persister([slow], run, 2, lines.append)
    persister.submit(train(run, 5))
    until(lambda: slow.begun == [step(5)])
    persister.submit(save(run, 10))
    assert not persister.finish(0.05)
    assert lines[0] == f"waiting for the copies of {step(5)}, {step(10)}, 0 s at most"
    assert f"not copied to slow within 0 s: {step(10)}" in lines[1:]
    slow.may_go_on.set()
    until(lambda: step(5) in slow.taken)
    assert persister.finish(0.05) and slow.begun == [step(5)]


def test_nothing_to_copy_is_finished_at_once(run: RunDirectory, slow: Slow) -> None:
    assert Persister([slow], run, 2, print).finish(0)
    persister = Persister([], run, 2, print)
    persister.submit(train(run, 5))
    assert persister.finish(0)


def test_a_checkpoint_that_is_gone_is_said(run: RunDirectory, drive: Path) -> None:
    lines: list[str] = []
    path = train(run, 5)
    shutil.rmtree(path)
    persister = Persister([DirectoryPlace(drive)], run, 2, lines.append)
    persister.submit(path)
    until(lambda: len(lines) == 1)
    assert "step-00000005 could not be copied" in lines[0]


def test_the_ledgers_last_line_is_copied_at_the_end(run: RunDirectory, other: RunDirectory, medium: Medium) -> None:
    persister = Persister([medium.place], run, 2, print)
    persister.submit(train(run, 5))
    book = ledger.Ledger(run.ledger)
    book.start("student", "A", 5, 500)
    book.end(5, 500, 9.0, "deadline")
    assert persister.finish(30)
    fetched([medium.place], other)
    assert ledger.sessions(other.ledger)[-1].reason == "deadline"


def test_a_hook_is_given_the_checkpoint(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.path.mkdir(parents=True)
    run.log.write_text("before\n")
    persister = Persister([Hook(f'echo printed; printf "%s|%s" "$DARAMGPT_CHECKPOINT" >{out}')], run, 2, print)
    path = train(RunDirectory(run.path), 5)
    persister.submit(path)
    assert persister.finish(30)
    assert out.read_text() == f"{path}|{path}"
    assert run.log.read_text() == "before\nprinted\n"


def test_a_hook_that_fails_is_said_and_stops_nothing(run: RunDirectory, drive: Path) -> None:
    lines: list[str] = []
    persister = Persister([Hook("echo ran; exit 3 #"), DirectoryPlace(drive)], run, 2, lines.append)
    persister.submit(train(run, 5))
    assert persister.finish(30)
    # It may have done a part of what it does: it is not run twice with one checkpoint.
    assert run.log.read_text() == "ran\n"
    assert sum("could not be copied" in line and "exit code 3" in line for line in lines) == 1
    assert (drive / NAME / step(5)).is_dir()


def test_a_hook_that_hangs_is_ended_with_all_that_it_started(run: RunDirectory, tmp_path: Path) -> None:
    lines: list[str] = []
    pid = tmp_path / "pid"
    persister = Persister([Hook(f"sleep 600 & echo $! >{pid}; wait #")], run, 2, lines.append)
    persister.submit(train(run, 5))
    until(lambda: pid.is_file() and pid.read_text().strip() != "")
    child = int(pid.read_text())
    assert not persister.finish(0.05)
    assert any("hook" in line and step(5) in line for line in lines)

    def is_over() -> bool:
        try:
            return "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True

    until(is_over)


def test_a_hook_is_nothing_to_fetch_from(other: RunDirectory) -> None:
    lines: list[str] = []
    fetch([Hook("true")], other, lines.append)
    assert lines == [] and not other.path.exists()
