"""Models that a run has no part in, measured on its held-out text beside its own: rows that are marked as compared.

One is loaded at a time, at full precision, and let go before the next. A model whose tokenizer is the shards' own is
measured on the very rows of the run's models, and its closeness to the teacher with it; any other reads the same text
in tokens of its own (`other_tokenizer`).

A row carries fingerprints of the model and of the text that it was measured on: who is asked for again costs nothing,
and a row is dropped where the text has become another.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from daramgpt import teacher
from daramgpt.errors import UserError
from daramgpt.evaluation.held_out import Measured, held_out_tokens, measure, measured_batches
from daramgpt.evaluation.other_tokenizer import OtherRows, OwnTokenizer
from daramgpt.pace import Pace
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Shards

if TYPE_CHECKING:
    from daramgpt.teacher import Teacher

Row = dict[str, Any]
# Tokens that show whether a model's logits are what they are taken for.
TRIAL_TOKENS = 6
_KEYS_OF_TEACHER = ("teacher.model: ", "teacher.precision: ")


@dataclass(frozen=True)
class Candidate:
    """A model that is to be compared.

    Attributes:
        given: folder or hub id, as the user gave it.
        name: of the folder, or the hub id.
        path: where it lies.
        fingerprint: of weights, config and tokenizer.
        max_positions: longest row that it has positions for.
    """

    given: str
    name: str
    path: Path
    tokenizer: OwnTokenizer
    fingerprint: str
    max_positions: int


def find(models: Iterable[str]) -> list[Candidate]:
    """The models, fetched from the hub where they are no folders; none is loaded yet.

    Raises:
        UserError: one is not there, is no causal language model, or has no tokenizer.
    """
    found = []
    for given in models:
        with _named(given):
            path = teacher.resolve(given)
            try:
                positions = teacher.max_positions(path)
            except (AttributeError, TypeError):
                raise UserError(
                    f"{path}/config.json names no max_position_embeddings", "give a causal language model that has some"
                ) from None
            tokenizer = OwnTokenizer(path)
            digest = hashlib.sha256(f"{teacher.fingerprint(path)} {tokenizer.sha256}".encode()).hexdigest()
        is_folder = Path(given).is_dir()
        # Where a folder lies, not how it was called from here.
        name, source = (path.resolve().name, str(path.resolve())) if is_folder else (given, given)
        found.append(Candidate(source, name, path, tokenizer, digest, positions))
    return found


@contextmanager
def _named(given: str) -> Iterator[None]:
    """What is wrong with a model by the option that gave it."""
    try:
        yield
    except UserError as error:
        fault = error.fault
        for key in _KEYS_OF_TEACHER:
            fault = fault.removeprefix(key)
        raise UserError(f"--compare {given}: {fault}", error.mend) from None


def text_sha256(recipe: Recipe, shards: Shards, teacher_dir: Path | None) -> str:
    """Of all but the model that a compared row depends on."""
    said = [
        shards.sha256,
        recipe.evaluation.heldout_tokens,
        recipe.curriculum.attention,
        None if teacher_dir is None else teacher.fingerprint(teacher_dir),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def kept_rows(evaluation: dict[str, Any], text: str) -> list[Row]:
    """The compared rows of an earlier evaluation that measured the same text.

    Args:
        evaluation: what ``evaluation.json`` holds, which may be anything.
        text: from `text_sha256`.
    """
    rows = evaluation.get("rows")
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and row.get("compared") is True and row.get("text_sha256") == text
    ]


def add(
    rows: list[Row],
    candidates: Iterable[Candidate],
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    teacher_dir: Path | None,
    save: Callable[[list[Row]], None],
    say: Callable[[str], None],
) -> list[Row]:
    """Rows with those of models that they do not have yet; a model that has changed takes its own row's place.

    Args:
        rows: of an evaluation, the run's own models among them.
        teacher_dir: what KL and agreement refer to, where a tokenizer is the shards' own.
        save: called with all rows when one more is measured.

    Raises:
        UserError: a model cannot be loaded or measured, or the held-out text is not there.
    """
    text = text_sha256(recipe, shards, teacher_dir)
    for candidate in candidates:
        there = next((row for row in rows if _is_of(row, candidate, text)), None)
        if there is not None:
            say(f"evaluation: {there['name']} is compared already")
            continue
        say(f"evaluation: comparing with {candidate.name}")
        with _named(candidate.given):
            row = _measured_row(candidate, recipe, run, shards, teacher_dir, say)
        # Before the next is loaded: a model's modules point at each other.
        gc.collect()
        others = [one for one in rows if not (one.get("compared") and one.get("model") == candidate.given)]
        name = _unique(candidate.name, {one["name"] for one in others})
        marks = {
            "compared": True,
            "model": candidate.given,
            "model_sha256": candidate.fingerprint,
            "text_sha256": text,
        }
        rows = [*others, {"name": name, **row, **marks}]
        save(rows)
    return rows


def _measured_row(
    candidate: Candidate,
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    teacher_dir: Path | None,
    say: Callable[[str], None],
) -> Row:
    """What `results_table` shows of a model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = teacher.load(candidate.path, "fp32", device=device, cache_dir=run.teacher_weights)
    _check(loaded)
    stages, label = [stage.name for stage in shards.stages], f"evaluation of {candidate.name}"
    limit, apart = recipe.evaluation.heldout_tokens, recipe.curriculum.attention == "document"
    if _reads_shards(candidate, loaded, shards):
        # As the run's own models are measured.
        reference = _reference(candidate, loaded, run, teacher_dir, device)
        start_id = shards.eos_token_id if apart else None
        pace = Pace(say, label, held_out_tokens(shards, limit))
        measured = measure(loaded, shards, stages, limit, reference, start_id, pace.advance)
    else:
        context_tokens = min(candidate.max_positions, shards.context_tokens)
        rows = OtherRows(shards, candidate.tokenizer, limit, context_tokens, apart)
        if rows.max_token_id >= len(loaded.head_weight):
            raise UserError(
                f"its tokenizer has a token {rows.max_token_id}, its embedding {len(loaded.head_weight)} rows",
                "give a model with the tokenizer that it was trained with",
            )
        if rows.num_unknown:
            say(
                f"evaluation: {candidate.name} cannot read all of the text, {rows.num_unknown:,} of its "
                f"{rows.num_tokens:,} tokens stand for what it does not know"
            )
        measured = measure(loaded, rows, stages, sys.maxsize, advance=Pace(say, label, rows.num_tokens).advance)
    _check_text(measured, shards, limit)
    return {
        "parameters": loaded.num_parameters,
        "bytes": loaded.weight_bytes,
        "bits_per_byte": measured.bits_per_byte,
        "kl_to_teacher": measured.kl_to_teacher,
        "top1_agreement": measured.top1_agreement,
        "tokens_per_second": measured.tokens_per_second,
    }


def _reads_shards(candidate: Candidate, loaded: Teacher, shards: Shards) -> bool:
    """Whether the rows of the shards are the model's own tokens, and not too long for it."""
    return (
        candidate.max_positions >= shards.context_tokens
        and len(loaded.head_weight) >= shards.vocab_size
        and candidate.tokenizer.gives_tokens_of(OwnTokenizer(shards.tokenizer_dir))
    )


def _reference(
    candidate: Candidate, loaded: Teacher, run: RunDirectory, teacher_dir: Path | None, device: torch.device
) -> Teacher | None:
    """The run's teacher, where its logits and the model's are of the same tokens."""
    if teacher_dir is None:
        return None
    if teacher.fingerprint(teacher_dir) == teacher.fingerprint(candidate.path):
        return loaded
    reference = teacher.load(teacher_dir, "fp32", device=device, cache_dir=run.teacher_weights)
    return reference if len(reference.head_weight) == len(loaded.head_weight) else None


@torch.inference_mode()
def _check(loaded: Teacher) -> None:
    """That a model is what is measured here: logits that are hidden states times a head, of tokens before alone.

    Raises:
        UserError: it is not.
    """
    mend = "give a causal language model whose logits are its last hidden states times its output embedding"
    num_tokens = min(TRIAL_TOKENS, loaded.max_positions)
    ids = torch.arange(num_tokens, device=loaded.head_weight.device).unsqueeze(0) % len(loaded.head_weight)
    hidden = loaded.hidden_states(ids)
    logits = loaded.model(ids).logits
    fits = hidden.shape[-1] == loaded.head_weight.shape[1] and logits.shape[-1] == loaded.head_weight.shape[0]
    if not fits or not _close(F.linear(hidden, loaded.head_weight, loaded.head_bias), logits):
        raise UserError("its logits are not its last hidden states times its output embedding", mend)
    other_end = ids.clone()
    other_end[0, -1] = 0
    if not _close(loaded.hidden_states(other_end)[:, :-1], hidden[:, :-1]):
        raise UserError("it sees the tokens that it is to predict", mend)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _check_text(measured: Measured, shards: Shards, limit: int) -> None:
    for stage, counted in measured.text.items():
        wanted = sum(text_bytes for *_, text_bytes in measured_batches(shards, stage, limit))
        assert counted["text_bytes"] == wanted, f"{stage}: {counted['text_bytes']} bytes of {wanted} were measured"


def _is_of(row: Row, candidate: Candidate, text: str) -> bool:
    return (
        row.get("compared") is True
        and row.get("model_sha256") == candidate.fingerprint
        and row.get("text_sha256") == text
    )


def _unique(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found
