"""Checkpoint → Hugging Face directory with a model card, put in place in one step.

The directory is complete or absent: everything is written into a temporary one beside it, which then takes its name.
``export.json`` in it records which checkpoint and evaluation it was made from, so that running again costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import model_card
from daramgpt.errors import UserError
from daramgpt.generate import Sampling
from daramgpt.recipe import Recipe, Shape
from daramgpt.run_directory import RunDirectory, parse_json, read_text, write_json

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedModel

RECORD = "export.json"
WEIGHTS = "model.safetensors"


def export(recipe: Recipe, run: RunDirectory, say: Callable[[str], None]) -> Path:
    """Write the newest verified checkpoint of a run as ``run.export``; returns at once where that stands already.

    Raises:
        UserError: the run has no checkpoint or no shards, or the disk is full.
    """
    from daramgpt import checkpoint

    saved = checkpoint.newest(run.checkpoints, say)
    if saved is None:
        raise UserError(
            f"{run.checkpoints} holds no checkpoint", f"train first: python -m daramgpt train {recipe.name}"
        )
    record = {
        "step": saved.state["step"],
        "num_steps": saved.state["num_steps"],
        "tokens": saved.state["tokens"],
        "checkpoint_sha256": saved.sha256,
        "evaluation_sha256": _sha256(run.evaluation) if run.evaluation.is_file() else None,
    }
    if stands(run.export, record):
        say(f"export: {run.export} already holds step {record['step']:,}")
        return run.export
    tokenizer_dir = run.shards / "tokenizer"
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UserError(
            f"{tokenizer_dir} holds no tokenizer",
            f"remove {run.shards} and run: python -m daramgpt prepare {recipe.name}",
        )
    model = restore_student(recipe.student, saved.weights(), tokenizer_dir)
    card = model_card.write(recipe, run, record, sum(parameter.numel() for parameter in model.parameters()))
    save_model(model, tokenizer_dir, run.export, card, record)
    size = sum(file.stat().st_size for file in run.export.iterdir())
    done = "" if record["step"] >= record["num_steps"] else f", partial: {record['num_steps']:,} steps are planned"
    say(f"export: {run.export}, step {record['step']:,}, {size / 1e6:,.1f} MB{done}")
    return run.export


def push(run: RunDirectory, repo_id: str, is_public: bool, say: Callable[[str], None]) -> None:
    """Upload what is exported to a repository on the Hugging Face hub, made where there is none, as one commit.

    Args:
        run: whose export.
        repo_id: ``owner/name``.
        is_public: of a repository that is made; one that is there stays as it is.
        say: takes lines.

    Raises:
        UserError: that is no name of a repository, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise ValueError("the owner is missing")
    except ValueError as error:
        raise UserError(f"--push {repo_id}: {str(error).splitlines()[0]}", "give OWNER/NAME") from None
    record = parse_json(read_text(run.export / RECORD))
    try:
        api = HfApi()
        api.create_repo(repo_id, private=not is_public, exist_ok=True)
        # What it was made from is this machine's business.
        message = f"step {record['step']:,} of {record['num_steps']:,}"
        api.upload_folder(repo_id=repo_id, folder_path=run.export, commit_message=message, ignore_patterns=[RECORD])
    # The hub's library raises its own errors, those of its HTTP client, and those of the system.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"--push {repo_id}: {type(error).__name__}: {reason}",
            "log in by `hf auth login` or set HF_TOKEN to a token that may write, and run the same command again",
        ) from None
    say(f"pushed: https://huggingface.co/{repo_id}, {message}")


def restore_student(shape: Shape, weights: Mapping[str, torch.Tensor], tokenizer_dir: Path) -> GPT2LMHeadModel:
    """The fp32 student that a checkpoint's weights describe, in evaluation mode on the CPU.

    Args:
        shape: width, heads and blocks; vocabulary and positions are those of the weights.
        weights: by Hugging Face name, the tied head left out.
        tokenizer_dir: tells the token that ends a text.
    """
    from transformers import AutoTokenizer

    from daramgpt import student

    vocab_size = weights["transformer.wte.weight"].shape[0]
    max_positions = weights["transformer.wpe.weight"].shape[0]
    end_id = AutoTokenizer.from_pretrained(tokenizer_dir).eos_token_id
    model = student.build(shape, vocab_size, max_positions, end_id, seed=0)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    return model.eval()


def save_model(
    model: PreTrainedModel,
    tokenizer_dir: Path,
    out_dir: Path,
    card: str | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write a model and its tokenizer as a Hugging Face directory, in place of what is there.

    Args:
        model: as it is to be saved.
        tokenizer_dir: its tokenizer.
        out_dir: the directory; replaced in one step.
        card: text of README.md.
        record: what it was made from, for `stands`.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, GenerationConfig

    from daramgpt import student

    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        end_id = model.config.eos_token_id
        drawn = Sampling()
        model.generation_config = GenerationConfig(
            eos_token_id=end_id,
            bos_token_id=end_id,
            pad_token_id=end_id,
            do_sample=True,
            temperature=drawn.temperature,
            top_p=drawn.top_p,
        )
        student.save(model, temporary)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        # The tokenizer's own limit is none; the model's positions are one that users run into.
        tokenizer.model_max_length = int(model.config.max_position_embeddings)
        tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        write_json(temporary / RECORD, {**(record or {}), "model_sha256": _sha256(temporary / WEIGHTS)})
        _take_place(temporary, out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out_dir}: the model could not be written: {error}", "make room there and try again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stands(out_dir: Path, record: Mapping[str, Any]) -> bool:
    """Whether a directory was written from `record` and its weights are still those that were written."""
    try:
        found = parse_json(read_text(out_dir / RECORD))
        return all(found.get(key) == value for key, value in record.items()) and (
            found["model_sha256"] == _sha256(out_dir / WEIGHTS)
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _take_place(temporary: Path, out_dir: Path) -> None:
    """Rename onto `out_dir`; a directory that is there is moved aside first, as it cannot be replaced."""
    aside = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(aside)
    temporary.rename(out_dir)
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
