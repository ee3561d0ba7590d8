"""Checkpoints of our own: verified, written in one step, free of pickles, ranks and ZeRO stages.

A checkpoint is a directory ``step-00000123/``: ``weights``, ``exp_avg`` and ``exp_avg_sq`` as fp32 safetensors, a
tensor for each parameter by its Hugging Face name, ``rng.safetensors``, ``state.json`` (position, schedule, loss scale,
recipe), and ``manifest.json``: size and sha256 of each file, and what they were written by. It is written into a
temporary directory, synced, and renamed; what a kill leaves behind is never taken for a checkpoint. Older ones are
removed once the new one has been read back and verified. Loading takes the newest one whose files all verify and says
what it passed over; ``latest`` names the one that was written last, so that its loss is seen.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.errors import UserError
from daramgpt.run_directory import open_regular, parse_json, read_text, write_atomically

if TYPE_CHECKING:
    import torch

    from daramgpt.engine import Distiller

TENSOR_FILES = ("weights", "exp_avg", "exp_avg_sq", "rng")
MANIFEST = "manifest.json"
LATEST = "latest"
# Beginnings of the names of what is being written and of what is being removed.
WRITING, REMOVING = ".writing-", ".removing-"
# Libraries whose versions a manifest names.
VERSIONED = ("daramgpt", "torch", "deepspeed", "transformers", "safetensors")
# How a rank begins its refusal to go on, where all ranks have to start again from the newest checkpoint.
START_AGAIN = "start again from the newest checkpoint: "
# Room that stays free beyond the checkpoint itself, for logs and metrics.
SPARE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint.

    Attributes:
        path: its directory.
        state: ``step``, ``tokens``, ``num_steps`` and what else was saved beside the tensors.
        sha256: of its weights.
    """

    path: Path
    state: dict[str, Any]
    sha256: str

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """One of `TENSOR_FILES` as CPU tensors by parameter name."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 weights of the student by their Hugging Face names, without the tied head and what is trained along."""
        from daramgpt.engine import PROJECTIONS

        return {name: value for name, value in self.tensors("weights").items() if not name.startswith(PROJECTIONS)}


def save(
    checkpoints: Path,
    distiller: Distiller,
    state: dict[str, Any],
    keep: int,
    facts: dict[str, Any] | None = None,
    in_use: Callable[[], Path | None] = lambda: None,
) -> Path | None:
    """Write a checkpoint at an optimizer boundary; called by every rank, written by the first.

    Args:
        checkpoints: directory that holds the run's checkpoints.
        distiller: whose weights, moments, loss scale and random state are saved.
        state: JSON values to keep beside them; must hold ``step``.
        keep: newest checkpoints that stay; older ones are removed once this one verifies.
        facts: JSON values for the manifest, beside time and versions.
        in_use: a checkpoint that somebody reads and that stays for now.

    Returns:
        Its directory on the first rank, None on the others.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched. Raised by every rank.
    """
    tensors = distiller.gather()
    error: UserError | None = None
    path: Path | None = None
    if distiller.rank == 0:
        try:
            path = _write(checkpoints, tensors, {**state, "loss_scaler": distiller.loss_scaler()}, facts or {})
            if damage := fault(path):
                raise UserError(
                    f"{path} does not hold what was written: {damage}",
                    "earlier checkpoints are untouched; see whether this disk is sound, or give another --run",
                )
            prune(checkpoints, keep, in_use())
        except UserError as caught:
            error = caught
        except OSError as refusal:
            error = UserError(
                f"{checkpoints}: an older checkpoint could not be removed: {refusal}",
                "see that this folder can be written and run the same command again",
            )
    if distiller.any_rank(error is not None):
        raise error or UserError("the first rank could not save", "see its line")
    return path


def _write(
    checkpoints: Path, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], facts: dict[str, Any]
) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = f"step-{state['step']:08d}"
    final, temporary = checkpoints / name, checkpoints / f"{WRITING}{name}"
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in (*checkpoints.glob(f"{WRITING}*"), *checkpoints.glob(f"{REMOVING}*")):
            shutil.rmtree(leftover)
        if shutil.disk_usage(checkpoints).free < size + SPARE_BYTES:
            raise OSError(f"{size + SPARE_BYTES:,} bytes are needed")
        temporary.mkdir()
        for group in TENSOR_FILES:
            save_file(tensors[group], temporary / f"{group}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        files = {file.name: _describe(file) for file in sorted(temporary.iterdir())}
        manifest = {"files": files, "written": round(time.time(), 3), "versions": _versions(), **facts}
        manifest["sha256"] = _sha256_of(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if final.exists():
            # Only one that failed to verify is ever written again.
            _remove(final)
        temporary.rename(final)
        write_atomically(checkpoints / LATEST, f"{name}\n")
        _sync(checkpoints)
    except (OSError, SafetensorError) as refusal:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{checkpoints}: the checkpoint of step {state['step']} could not be written: {refusal}",
            "make room there and run the same command again; earlier checkpoints are untouched",
        ) from None
    return final


def prune(checkpoints: Path, keep: int, in_use: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and but `in_use`."""
    for path in _steps(checkpoints)[keep:]:
        if path != in_use:
            _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: one that is half removed is never read.
    doomed = path.with_name(f"{REMOVING}{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def newest(checkpoints: Path, say: Callable[[str], None] = print) -> Saved | None:
    """The newest checkpoint that verifies, or None where none was ever written.

    Raises:
        UserError: there are checkpoints but none verifies: never start afresh in silence.
    """
    paths, named = _steps(checkpoints), _latest(checkpoints)
    if named is not None and checkpoints / named not in paths:
        say(f"checkpoint lost: {checkpoints / LATEST} names {named}, which is not there")
    for path in paths:
        damage, saved = _verify(path)
        if saved is not None and saved.state["step"] != int(path.name[5:]):
            damage = f"it is of step {saved.state['step']}"
        elif saved is not None:
            return saved
        say(f"checkpoint passed over: {path}: {damage}")
    if paths or named is not None:
        raise UserError(
            f"none of the {max(1, len(paths))} checkpoints in {checkpoints} verifies",
            "bring back a copy, or remove that folder to begin again",
        )
    return None


def fault(path: Path) -> str | None:
    """Why a checkpoint directory does not verify; None where it does."""
    return _verify(path)[0]


def newest_state(checkpoints: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint without verifying its tensors; for displays only."""
    for path in _steps(checkpoints):
        try:
            state = parse_json(read_text(path / "state.json"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict):
            return state
    return None


def _steps(checkpoints: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = [path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _latest(checkpoints: Path) -> str | None:
    """The checkpoint that was written last, by its name; None where that is not known."""
    try:
        name = read_text(checkpoints / LATEST).strip()
    except (OSError, ValueError):
        return None
    return name if name.startswith("step-") and name[5:].isdecimal() else None


def _verify(path: Path) -> tuple[str | None, Saved | None]:
    """What is wrong with a checkpoint, or what it holds."""
    try:
        manifest = parse_json(read_text(path / MANIFEST))
        if manifest.pop("sha256") != _sha256_of(manifest):
            return f"{MANIFEST} is not what was written", None
        files: dict[str, Any] = manifest["files"]
        for name in ("state.json", *(f"{group}.safetensors" for group in TENSOR_FILES)):
            if _describe(path / name) != files[name]:
                return f"{name} is not what was written", None
        state = parse_json(read_text(path / "state.json"))
        if not isinstance(state, dict) or type(state.get("step")) is not int:
            return "state.json names no step", None
        return None, Saved(path, state, files["weights.safetensors"]["sha256"])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing", None
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})", None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})", None


def _sha256_of(manifest: dict[str, Any]) -> str:
    """Of all that it says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    with open(file, "rb", opener=open_regular) as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
