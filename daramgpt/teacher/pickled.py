"""Pickled weights become safetensors once, so that nothing else ever reads a pickle.

A ``pytorch_model.bin`` is opened by ``torch.load(weights_only=True)`` alone, which refuses all that is not a tensor,
and memory-mapped, so that the pages are the file's. It is written in shards, one shard of the source at a time, into a
temporary directory that is renamed when it is complete. The name is a digest of the sources' names, sizes and times.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch

from daramgpt.errors import UserError

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def default_cache() -> Path:
    """Where conversions go when a run names no place of its own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "daramgpt" / "teachers"


def is_pickled(model_dir: Path) -> bool:
    """Whether a model has its weights in pickles only."""
    if any((model_dir / name).is_file() for name in SAFETENSORS):
        return False
    return any((model_dir / name).is_file() for name in (PICKLE, PICKLE_INDEX))


def converted(model_dir: Path, cache_dir: Path) -> Path:
    """The directory with `model_dir`'s config and pickled weights as safetensors, made when it is not there yet.

    Of several processes one converts and the others wait for it.

    Raises:
        UserError: a file is missing, damaged, or holds more than tensors; or `cache_dir` cannot be written.
    """
    try:
        sources = _sources(model_dir)
        target = cache_dir / _digest(sources)
        if target.is_dir():
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                partial = cache_dir / f"{target.name}.partial"
                # Only a process that died left one, as we hold the lock.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _convert(sources, partial)
                partial.rename(target)
    except OSError as error:
        raise UserError(
            f"teacher.model: the pickled weights of {model_dir} could not be converted to safetensors: {error}",
            f"see that they are complete and that {cache_dir} can be written and has room for them",
        ) from None
    return target


def _sources(model_dir: Path) -> list[Path]:
    """The config and every pickle of a model."""
    index = model_dir / PICKLE_INDEX
    names = [PICKLE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            names = []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise UserError(f"teacher.model: {index} is no index of weights", "give a complete causal language model")
    return [model_dir / "config.json", *(model_dir / name for name in names)]


def _digest(sources: list[Path]) -> str:
    stats = [(source.name, source.stat().st_size, source.stat().st_mtime_ns) for source in sources]
    return hashlib.sha256(json.dumps([str(sources[0].parent.resolve()), stats]).encode()).hexdigest()[:16]


def _convert(sources: list[Path], target: Path) -> None:
    from safetensors.torch import save_file

    config, *pickles = sources
    shutil.copyfile(config, target / config.name)
    file_of: dict[str, str] = {}
    for number, pickle in enumerate(pickles, start=1):
        tensors = _unshared(_tensors(pickle))
        name = f"model-{number:05d}-of-{len(pickles):05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": file_of}
    (target / SAFETENSORS[1]).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _tensors(pickle: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickle, mapped where its format allows.

    Raises:
        UserError: it is damaged or holds more than tensors.
    """
    from zipfile import is_zipfile

    try:
        # torch wrote no zip before version 1.6, and only a zip can be mapped.
        tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=is_zipfile(pickle))
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        tensors = None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(
            f"teacher.model: {pickle} is damaged, or a pickle of more than tensors, which could run code",
            "give a model with safetensors",
        )
    return dict(tensors)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, as safetensors wants them: the second of a tied pair is copied."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format) if storage in seen else tensor
        tensors[name] = tensors[name].contiguous()
        seen.add(storage)
    return tensors
