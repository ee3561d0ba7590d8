"""Checkpoints: what is damaged is passed over and said, a failed save costs nothing, and no pickle is read."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from daramgpt import checkpoint
from daramgpt.errors import UserError

FILES = [f"{group}.safetensors" for group in checkpoint.TENSOR_FILES] + ["state.json", "manifest.json"]


class FakeDistiller:
    """What `checkpoint.save` asks of an engine: tensors that depend on `step`, and one rank's answers."""

    def __init__(self, step: int = 0, rank: int = 0, other_failed: bool = False) -> None:
        self.rank, self.other_failed = rank, other_failed
        generator = torch.Generator().manual_seed(step)
        names = ("transformer.wte.weight", "transformer.ln_f.bias")
        self.groups = {
            group: {name: torch.randn(4, 3, generator=generator) for name in names}
            for group in ("weights", "exp_avg", "exp_avg_sq")
        }
        self.groups["rng"] = {"cpu": torch.randint(256, (40,), generator=generator, dtype=torch.uint8)}

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        return self.groups if self.rank == 0 else {}

    def any_rank(self, flag: bool) -> bool:
        return flag or self.other_failed

    def loss_scaler(self) -> dict[str, Any]:
        return {"cur_scale": 2.0**16}


def save(checkpoints: Path, step: int, keep: int = 9, **distiller: Any) -> Path | None:
    state = {"step": step, "tokens": 100 * step, "num_steps": 99}
    return checkpoint.save(checkpoints, FakeDistiller(step, **distiller), state, keep)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    save(folder, 5)
    save(folder, 10)
    return folder


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.newest_state(tmp_path / "none") is None


def test_the_newest_holds_what_was_saved(checkpoints: Path) -> None:
    lines: list[str] = []
    saved = checkpoint.newest(checkpoints, lines.append)
    assert saved is not None and lines == []
    assert saved.path == checkpoints / "step-00000010"
    assert saved.state == {"step": 10, "tokens": 1000, "num_steps": 99, "loss_scaler": {"cur_scale": 65536.0}}
    for group, tensors in FakeDistiller(10).groups.items():
        found = saved.tensors(group)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert saved.weights().keys() == FakeDistiller(10).groups["weights"].keys()
    assert checkpoint.newest_state(checkpoints) == saved.state


def truncate(file: Path) -> None:
    # Two bytes: the last line feed of a manifest holds nothing.
    file.write_bytes(file.read_bytes()[:-2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path, bit: int = 0, part: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(part * (len(data) - 1))] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_said_and_the_older_checkpoint_taken(checkpoints: Path, name: str, damage: Any) -> None:
    damage(checkpoints / "step-00000010" / name)
    lines: list[str] = []
    saved = checkpoint.newest(checkpoints, lines.append)
    assert saved is not None and saved.state["step"] == 5
    assert len(lines) == 1
    assert str(checkpoints / "step-00000010") in lines[0]
    # A sum altered in the manifest is the fault of the file whose sum it is, as far as one can see.
    assert name in lines[0] or (name == "manifest.json" and "is not what was written" in lines[0])


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes(checkpoints: Path, name: str) -> None:
    good = checkpoints / "step-00000010" / name
    before = good.read_bytes()
    for bit in range(8):
        for part in (0.0, 0.1, 0.3, 0.55, 0.77, 0.93, 1.0):
            flip(good, bit, part)
            saved = checkpoint.newest(checkpoints, lambda _: None)
            # The manifest's last line feed holds nothing.
            harmless = name == "manifest.json" and part == 1.0
            assert saved is not None and (saved.state["step"] == 5 or harmless), (bit, part)
            good.write_bytes(before)


def test_where_none_verifies_nothing_begins_afresh(checkpoints: Path) -> None:
    for folder in checkpoints.glob("step-*"):
        flip(folder / "weights.safetensors")
    lines: list[str] = []
    with pytest.raises(UserError, match="none of the 2 checkpoints") as caught:
        checkpoint.newest(checkpoints, lines.append)
    assert str(checkpoints) in caught.value.fault and len(lines) == 2


def test_a_manifest_of_another_kind_is_passed_over(checkpoints: Path) -> None:
    for text in ("[]", "{}", '{"files": []}', '{"files": {"state.json": 3}}', "null", "[" * 100_000):
        (checkpoints / "step-00000010" / "manifest.json").write_text(text)
        saved = checkpoint.newest(checkpoints, lambda _: None)
        assert saved is not None and saved.state["step"] == 5


def test_what_a_kill_left_behind_is_no_checkpoint_and_is_cleared(checkpoints: Path) -> None:
    leftover = checkpoints / ".writing-step-00000015"
    shutil.copytree(checkpoints / "step-00000010", leftover)
    saved = checkpoint.newest(checkpoints)
    assert saved is not None and saved.state["step"] == 10
    save(checkpoints, 12)
    assert not leftover.exists()


def test_the_state_for_displays_comes_from_the_newest_that_can_be_read(checkpoints: Path) -> None:
    (checkpoints / "step-00000010" / "state.json").write_text("{")
    state = checkpoint.newest_state(checkpoints)
    assert state is not None and state["step"] == 5


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_trained_again(checkpoints: Path) -> None:
    flip(checkpoints / "step-00000010" / "exp_avg.safetensors")
    save(checkpoints, 10)
    saved = checkpoint.newest(checkpoints)
    assert saved is not None and saved.state["step"] == 10


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_are_kept(checkpoints: Path, keep: int) -> None:
    for step in (15, 20):
        save(checkpoints, step, keep)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        *(f"step-{step:08d}" for step in (5, 10, 15, 20)[-keep:]),
    ]


def test_older_ones_stay_until_the_new_one_verifies(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def damages(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if target.name == "step-00000015":
            truncate(target / "exp_avg.safetensors")
        return moved

    monkeypatch.setattr(Path, "rename", damages)
    with pytest.raises(UserError, match=r"exp_avg\.safetensors is not what was written"):
        save(checkpoints, 15, keep=2)
    saved = checkpoint.newest(checkpoints)
    assert saved is not None and saved.state["step"] == 10 and (checkpoints / "step-00000005").is_dir()


def test_one_that_is_being_read_stays(checkpoints: Path) -> None:
    read = checkpoints / "step-00000005"
    state = {"step": 15, "tokens": 1500, "num_steps": 99}
    checkpoint.save(checkpoints, FakeDistiller(15), state, 2, in_use=lambda: read)  # type: ignore[arg-type]
    assert read.is_dir()
    save(checkpoints, 20, 2)
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000015", "step-00000020"]


def test_the_loss_of_the_newest_is_said(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step-00000010")
    lines: list[str] = []
    saved = checkpoint.newest(checkpoints, lines.append)
    assert saved is not None and saved.state["step"] == 5
    assert len(lines) == 1 and "step-00000010" in lines[0] and "latest" in lines[0]


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"step-", b"../elsewhere", b"step-00000010/../x"], ids=repr)
def test_the_newest_is_found_without_its_name(checkpoints: Path, content: bytes | None) -> None:
    latest = checkpoints / "latest"
    assert latest.read_text() == "step-00000010\n"
    latest.unlink() if content is None else latest.write_bytes(content)
    lines: list[str] = []
    saved = checkpoint.newest(checkpoints, lines.append)
    assert saved is not None and saved.state["step"] == 10 and lines == []


def test_where_all_are_lost_nothing_begins_afresh(checkpoints: Path) -> None:
    for folder in checkpoints.glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="none of the"):
        checkpoint.newest(checkpoints, lambda _: None)


def test_a_manifest_says_what_wrote_it(checkpoints: Path) -> None:
    state = {"step": 15, "tokens": 1500, "num_steps": 99}
    path = checkpoint.save(checkpoints, FakeDistiller(15), state, 2, {"world_size": 2})  # type: ignore[arg-type]
    assert path is not None
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}


def refuses_to_save(checkpoints: Path) -> str:
    """Save step 15, which must fail, leave no trace, and leave what was there as it was."""
    before = contents(checkpoints)
    with pytest.raises(UserError) as caught:
        save(checkpoints, 15, keep=2)
    assert contents(checkpoints) == before
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000005", "step-00000010"]
    return str(caught.value)


def test_too_little_room_is_seen_before_writing(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    text = refuses_to_save(checkpoints)
    assert "bytes are needed" in text and "step 15" in text and str(checkpoints) in text and "make room" in text


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")], ids=repr
)
@pytest.mark.parametrize("written", [0, 2], ids=["first file", "third file"])
def test_a_disk_that_fills_while_saving(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, written: int
) -> None:
    original, calls = safetensors.torch.save_file, []

    def fills(tensors: dict[str, torch.Tensor], file: Path) -> None:
        calls.append(file)
        if len(calls) > written:
            Path(file).write_bytes(b"part of it")
            raise fault
        original(tensors, file)

    monkeypatch.setattr(safetensors.torch, "save_file", fills)
    assert "No space left on device" in refuses_to_save(checkpoints)
    monkeypatch.undo()
    save(checkpoints, 15)
    saved = checkpoint.newest(checkpoints)
    assert saved is not None and saved.state["step"] == 15


def test_a_disk_that_fills_with_the_last_small_files(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(path: Path, *_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", fills)
    refuses_to_save(checkpoints)


def test_an_old_checkpoint_that_cannot_be_removed_is_said_to_every_rank(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", denied)
    monkeypatch.setattr(checkpoint, "_write", lambda *_: checkpoints / "step-00000010")
    with pytest.raises(UserError, match="could not be removed"):
        save(checkpoints, 15, keep=1)


def test_ranks_other_than_the_first_write_nothing_and_fail_with_it(tmp_path: Path) -> None:
    assert save(tmp_path / "checkpoints", 5, rank=1) is None
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(UserError, match="first rank"):
        save(tmp_path / "checkpoints", 5, rank=1, other_failed=True)


def test_nothing_is_pickled(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle")

    for module, names in (
        (pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")),
        (torch, ("load", "save")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    save(checkpoints, 15)
    saved = checkpoint.newest(checkpoints)
    assert saved is not None and all(saved.tensors(group) for group in checkpoint.TENSOR_FILES)
    suffixes = {file.suffix for file in saved.path.iterdir()}
    assert suffixes == {".safetensors", ".json"}
