"""What decides the content of shards, so that others are never taken for those of this recipe, corpus and tokenizer."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.corpora import Corpus
from daramgpt.corpora.archives import parts_of
from daramgpt.shards.encode import tokenizer_sha256

if TYPE_CHECKING:
    from daramgpt.recipe import Recipe

# To be raised with every change to readers, cleaning, splitting or encoding that alters the tokens.
TEXT_VERSION = 2
_SAMPLE_BYTES = 64 * 1024


def fingerprint(
    recipe: Recipe, folder: Path, corpora: dict[str, Corpus], tokenizer_dir: Path, context_tokens: int
) -> dict[str, Any]:
    """One key for each thing that can differ, as plain data.

    Args:
        folder: of the corpora.
        corpora: by name.
    """
    curriculum = recipe.curriculum
    keys: dict[str, Any] = {
        "text_version": TEXT_VERSION,
        "context_tokens": context_tokens,
        "tokenizer_sha256": tokenizer_sha256(tokenizer_dir),
        "curriculum.scale": curriculum.scale,
        "curriculum.heldout_fraction": curriculum.heldout_fraction,
        "curriculum.heldout_documents": curriculum.heldout_documents,
        "corpus.strict": recipe.corpus.strict,
        "curriculum.stages": [stage.name for stage in curriculum.stages],
    }
    for stage in curriculum.stages:
        for key in ("corpus", "take", "unit"):
            keys[f"curriculum.stages.{stage.name}.{key}"] = getattr(stage, key)
    for name, corpus in corpora.items():
        keys[f"corpus.formats.{name}"] = corpus.format
        keys[f"corpus.splitters.{name}"] = recipe.corpus.splitter(name)
        if name in recipe.corpus.datasets:
            dataset = recipe.corpus.datasets[name]
            keys[f"corpus.datasets.{name}"] = dataset.model_dump()
            for path in sorted(path for path in Path(dataset.path).rglob("*") if path.is_file()):
                keys[f"corpus.datasets.{name}: {path.relative_to(dataset.path)}"] = _description(path)
        for path in (part for first in corpus.paths for part in parts_of(first)):
            # Neither whole paths nor times: a corpus may be moved, copied, or mounted anew for each session.
            keys[f"corpus file {name}: {path.relative_to(folder)}"] = _description(path)
    return keys


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first key that differs and how, as ``"key: value, now value"``; None if none does."""

    def shown(keys: dict[str, Any], key: str) -> str:
        return str(keys[key]) if key in keys else "absent"

    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            return f"{key}: {shown(found, key)}, now {shown(wanted, key)}"
    return None


def _description(path: Path) -> list[Any]:
    """Size and a hash of a file's two ends: an archive's end lists its members' checksums."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            sample = file.read(_SAMPLE_BYTES)
            file.seek(max(0, size - _SAMPLE_BYTES))
            return [size, blake2b(sample + file.read(_SAMPLE_BYTES), digest_size=16).hexdigest()]
    except OSError as error:
        return [error.strerror]
