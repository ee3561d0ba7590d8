"""Tokenise the curriculum into shards.

A thread keeps the tokenizer busy (it uses all cores and needs no interpreter) while this one reads and cuts the next
batch, so memory holds two batches whatever the corpus. Everything goes into ``shards.partial/`` and is renamed to
``shards/`` when the index, written last, is complete: what is called ``shards/`` is whole. Finished stages are noted
on the way; a run that was killed goes on after the last of them. What earlier stages took from a corpus that is still
needed is read again then, but not tokenised, which is most of the work.

The index carries a fingerprint of all that shaped the shards. Shards of another fingerprint are never used.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from daramgpt.corpora.archives import parts_of
from daramgpt.curriculum import Reader, Text, corpus_dir, take_bytes
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, write_json
from daramgpt.shards.encode import TOKENIZER_FILES, Batch, Encoded, Encoder, tokenizer_sha256
from daramgpt.shards.report import Pace, summary
from daramgpt.shards.rows import FORMAT_VERSION, INDEX, TOKENIZER, read_index, stage_file
from daramgpt.shards.writer import StreamWriter, disk_full_is_the_users, token_dtype

# To be raised with every change to readers, cleaning, splitting or encoding that alters the tokens.
TEXT_VERSION = 1

_BATCH_CHARACTERS = 400_000
_PROGRESS = "progress.json"
_SAMPLE_BYTES = 64 * 1024
# Text in a compressed corpus file, at most, and tokens in a byte of Korean text, with something to spare.
_MOST_TEXT_PER_FILE_BYTE = 10
_TOKENS_PER_TEXT_BYTE = 0.225


def prepare(
    recipe: Recipe, run: RunDirectory, tokenizer_dir: Path, context_tokens: int, say: Callable[[str], None]
) -> None:
    """Write ``shards/`` of a run, or go on writing it; returns at once where it is finished.

    Args:
        recipe: its curriculum and corpus sections decide what is read.
        tokenizer_dir: holds tokenizer.json; copied into the shards.
        context_tokens: length of a row.
        say: takes lines for the user.

    Raises:
        UserError: a corpus or the tokenizer is missing or unusable, a stage gets no text, the disk is full, or
            finished shards were made from something else.
    """
    encoder = Encoder(tokenizer_dir)
    folder = corpus_dir(recipe, run)
    reader = Reader(recipe, folder)
    wanted = fingerprint(recipe, folder, reader.files, tokenizer_dir, context_tokens)
    if _is_finished(run, wanted):
        say(f"shards in {run.shards} are complete, nothing to prepare")
        return
    if not encoder.keeps_line_feeds:
        say("this tokenizer has no token for a line feed: paragraphs are joined by spaces")
    partial = run.shards.with_name(f"{run.shards.name}.partial")
    with disk_full_is_the_users(partial.parent):
        finished = _resume(partial, wanted, say)
        _check_disk(recipe, reader, encoder, partial, finished)
        pace = Pace(say, [take_bytes(recipe, stage) for stage in recipe.curriculum.stages[len(finished) :]])
        for number in range(len(finished), len(recipe.curriculum.stages)):
            finished.append(_write_stage(recipe, reader, encoder, number, partial, context_tokens, pace))
            write_json(partial / _PROGRESS, {"fingerprint": wanted, "stages": finished})
        _finish(run, partial, finished, wanted, encoder, context_tokens, tokenizer_dir)
    for line in summary(finished):
        say(line)


def fingerprint(
    recipe: Recipe, folder: Path, files: dict[str, list[Path]], tokenizer_dir: Path, context_tokens: int
) -> dict[str, Any]:
    """All that decides what is in the shards, one key for each thing that can differ.

    Args:
        folder: of the corpora.
        files: of each corpus, below that folder.
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
        "corpus.formats": dict(sorted(recipe.corpus.formats.items())),
        "curriculum.stages": [stage.name for stage in curriculum.stages],
    }
    for stage in curriculum.stages:
        for key in ("corpus", "take", "unit"):
            keys[f"curriculum.stages.{stage.name}.{key}"] = getattr(stage, key)
    for corpus, paths in files.items():
        for path in (part for first in paths for part in parts_of(first)):
            # Neither whole paths nor times: a corpus may be moved, copied, or mounted anew for each session.
            keys[f"corpus file {corpus}: {path.relative_to(folder)}"] = [path.stat().st_size, _sample_hash(path)]
    return keys


def _sample_hash(path: Path) -> str:
    """Hash of a file's two ends, which tell files of one size apart: an archive's end lists its members' checksums."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
        file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
        return blake2b(sample + file.read(_SAMPLE_BYTES), digest_size=16).hexdigest()


def _is_finished(run: RunDirectory, wanted: dict[str, Any]) -> bool:
    if not run.shards.is_dir() or not any(run.shards.iterdir()):
        return False
    if not (run.shards / INDEX).is_file():
        raise UserError(
            f"{run.shards} holds files but no {INDEX}", "remove it, or use another run directory with --run"
        )
    found = read_index(run.shards)["fingerprint"]
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{run.shards} was made with another {key}: {_shown(found, key)}, now {_shown(wanted, key)}",
                f"remove {run.shards}, or use another run directory with --run",
            )
    return True


def _shown(keys: dict[str, Any], key: str) -> str:
    return str(keys[key]) if key in keys else "absent"


def _resume(partial: Path, wanted: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Stages finished by a prepare that was killed, if it was after the same shards; else a fresh start."""
    try:
        progress = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
        if progress["fingerprint"] == wanted and progress["stages"]:
            say(f"going on after stage {progress['stages'][-1]['name']}, which was finished before")
            return list(progress["stages"])
    except (FileNotFoundError, ValueError, KeyError):
        pass
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return []


def _check_disk(
    recipe: Recipe, reader: Reader, encoder: Encoder, partial: Path, finished: list[dict[str, Any]]
) -> None:
    file_bytes = {
        corpus: sum(part.stat().st_size for path in paths for part in parts_of(path))
        for corpus, paths in reader.files.items()
    }
    text: dict[str, int] = dict.fromkeys(file_bytes, 0)
    for stage in recipe.curriculum.stages[len(finished) :]:
        text[stage.corpus] += take_bytes(recipe, stage)
    most_text = sum(min(text[corpus], file_bytes[corpus] * _MOST_TEXT_PER_FILE_BYTE) for corpus in text)
    needed = round(most_text * _TOKENS_PER_TEXT_BYTE * token_dtype(encoder.vocab_size).itemsize)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"token shards in {partial} will need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free",
            "free some, use another folder with --run, or lower curriculum.scale",
        )


def _write_stage(
    recipe: Recipe, reader: Reader, encoder: Encoder, number: int, partial: Path, context_tokens: int, pace: Pace
) -> dict[str, Any]:
    """Write the files of a stage; what the index says of it."""
    stage = recipe.curriculum.stages[number]
    reader.skip_to(number)
    begin = time.monotonic()
    name = stage_file(number, stage.name)
    before = reader.report(stage.corpus)
    pace.begin(stage.name)

    def writer(file_name: str) -> StreamWriter:
        return StreamWriter(partial, file_name, encoder.eos_token_id, encoder.vocab_size, context_tokens)

    with writer(name) as training, writer(f"{name}.heldout") as heldout, ThreadPoolExecutor(1) as thread:
        for is_heldout, encoded in _encoded(reader.texts(number), encoder, thread):
            (heldout if is_heldout else training).append(encoded)
            pace.advance(training.text_bytes)
        files = training.finish() | heldout.finish()
    if not training.num_units:
        raise UserError(
            f"no text is left in corpus {stage.corpus} for stage {stage.name}",
            f"give more text, or lower the take of the stages before, or curriculum.scale ({recipe.curriculum.scale})",
        )
    seconds = time.monotonic() - begin
    read = reader.report(stage.corpus)
    info = {
        "name": stage.name,
        "corpus": stage.corpus,
        "unit": stage.unit,
        "take_bytes": take_bytes(recipe, stage),
        "documents": training.num_texts,
        "units": training.num_units,
        "unit_bytes": training.unit_bytes,
        "text_bytes": training.text_bytes,
        "tokens": training.num_tokens,
        "bytes_per_token": training.text_bytes / training.num_tokens,
        "unknown_bytes": training.unknown_bytes,
        "rows": training.num_rows,
        "heldout_documents": heldout.num_texts,
        "heldout_text_bytes": heldout.text_bytes,
        "heldout_tokens": heldout.num_tokens,
        "heldout_rows": heldout.num_rows,
        "cleaned": dict(read.cleaned - before.cleaned),
        "faults": read.faults[len(before.faults) :],
        "seconds": seconds,
        "megabytes_per_second": training.text_bytes / 1e6 / max(seconds, 1e-9),
        "files": files,
    }
    pace.end(info)
    return info


def _encoded(texts: Iterator[Text], encoder: Encoder, thread: ThreadPoolExecutor) -> Iterator[tuple[bool, Encoded]]:
    """Tokens batch by batch, with whether they are held out; the next batch is read while one is encoded."""
    under_way: tuple[bool, Future[Encoded]] | None = None
    for is_heldout, batch in _batches(texts):
        following = is_heldout, thread.submit(encoder.encode, batch)
        if under_way is not None:
            yield under_way[0], under_way[1].result()
        under_way = following
    if under_way is not None:
        yield under_way[0], under_way[1].result()


def _batches(texts: Iterator[Text]) -> Iterator[tuple[bool, Batch]]:
    """Units in batches of a bounded size, training and held-out ones apart; a long text may fill several."""
    batch, is_heldout, num_characters = Batch([], []), False, 0
    for text in texts:
        for place, unit in enumerate(text.units, 1):
            if batch.units and (text.heldout != is_heldout or num_characters >= _BATCH_CHARACTERS):
                yield is_heldout, batch
                batch, num_characters = Batch([], []), 0
            is_heldout = text.heldout
            batch.units.append(unit)
            batch.ends_text.append(place == len(text.units))
            num_characters += len(unit)
    if batch.units:
        yield is_heldout, batch


def _finish(
    run: RunDirectory,
    partial: Path,
    stages: list[dict[str, Any]],
    wanted: dict[str, Any],
    encoder: Encoder,
    context_tokens: int,
    tokenizer_dir: Path,
) -> None:
    """Copy the tokenizer, write the index and give the directory its name."""
    (partial / TOKENIZER).mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, partial / TOKENIZER / name)
    files = {name: file for stage in stages for name, file in stage["files"].items()}
    index = {
        "format": FORMAT_VERSION,
        "context_tokens": context_tokens,
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos_token_id,
        "keeps_line_feeds": encoder.keeps_line_feeds,
        "stages": [{key: value for key, value in stage.items() if key != "files"} for stage in stages],
        "files": files,
        "fingerprint": wanted,
    }
    write_json(partial / INDEX, index)
    partial.replace(run.shards)
    (run.shards / _PROGRESS).unlink(missing_ok=True)
