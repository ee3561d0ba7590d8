"""What came out of a run: held-out bits per byte, closeness to the teacher, speed, and text to read.

`evaluate` measures the teacher at full precision and in its 8 bits, the student, and the same student without a
teacher where the recipe asks for one, and writes ``evaluation.json``. It names the checkpoints that were measured, so
that running again costs nothing. Models of others may be compared on the same text: further rows, which a later
evaluation of the run keeps. Importing this package is cheap: what computes is imported when it is called.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import results_table
from daramgpt.errors import UserError
from daramgpt.ledger import entries
from daramgpt.pace import Pace
from daramgpt.recipe import Evaluation, Recipe
from daramgpt.run_directory import RunDirectory, parse_json, read_json, read_text, write_json
from daramgpt.text_table import counted

if TYPE_CHECKING:
    from daramgpt.checkpoint import Saved
    from daramgpt.evaluation.compared import Candidate
    from daramgpt.evaluation.held_out import Measured, Model
    from daramgpt.shards import Shards

TEACHER, STUDENT, BASELINE = "teacher", "student", "student without teacher"


def evaluate(
    recipe: Recipe, run: RunDirectory, say: Callable[[str], None], models: Iterable[str] = ()
) -> dict[str, Any]:
    """Measure the models of a run, print the result, and keep it in ``evaluation.json``.

    Args:
        models: to compare with, folders or hub ids; each is measured once.

    Returns:
        The content of that file; as it stands where the same checkpoints were measured before.

    Raises:
        UserError: there is no checkpoint of the student, no teacher, or no shards, or a model to compare with is none.
    """
    from daramgpt import checkpoint

    student_saved = checkpoint.newest(run.checkpoints, say)
    if student_saved is None:
        raise UserError(
            f"{run.checkpoints} holds no checkpoint", f"train first: python -m daramgpt train {recipe.name}"
        )
    baseline = run.part("baseline")
    baseline_saved = checkpoint.newest(baseline.checkpoints, say) if recipe.evaluation.baseline else None
    plan = _plan(run)
    # Before anything is measured: a wrong name shows at once.
    candidates = _candidates(models)
    measured_from = _fingerprint(recipe, plan, student_saved, baseline_saved)
    evaluation = _standing(run, measured_from)
    if evaluation is not None:
        say(f"evaluation: step {evaluation['step']:,} is measured already, {run.evaluation}")
    else:
        before = read_json(run.evaluation)
        evaluation = _measure(recipe, run, plan, student_saved, baseline_saved, say)
        evaluation["measured_from"] = measured_from
        evaluation["rows"] += _compared_before(recipe, run, before)
        write_json(run.evaluation, evaluation)
    if candidates:
        _compare(recipe, run, evaluation, candidates, say)
    say(results_table.format_evaluation(evaluation))
    return evaluation


def _candidates(models: Iterable[str]) -> list[Candidate]:
    models = list(models)
    if not models:
        return []
    from daramgpt.evaluation import compared

    return compared.find(models)


def _compared_before(recipe: Recipe, run: RunDirectory, before: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of other models that the run's own new figures leave as they are."""
    if not before:
        return []
    from daramgpt.evaluation import compared
    from daramgpt.shards import Shards

    return compared.kept_rows(before, compared.text_sha256(recipe, Shards(run.shards), _teacher_dir(recipe, run)))


def _compare(
    recipe: Recipe,
    run: RunDirectory,
    evaluation: dict[str, Any],
    candidates: list[Candidate],
    say: Callable[[str], None],
) -> None:
    """Measure what `evaluation` has no row of yet, and keep each row in ``evaluation.json`` as soon as it is there."""
    from daramgpt.evaluation import compared
    from daramgpt.shards import Shards

    def save(rows: list[dict[str, Any]]) -> None:
        evaluation["rows"] = rows
        write_json(run.evaluation, evaluation)

    compared.add(evaluation["rows"], candidates, recipe, run, Shards(run.shards), _teacher_dir(recipe, run), save, say)


def _measure(
    recipe: Recipe,
    run: RunDirectory,
    plan: dict[str, Any],
    student_saved: Saved,
    baseline_saved: Saved | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from daramgpt import hardware
    from daramgpt.evaluation.held_out import CausalModel, compare, held_out_tokens
    from daramgpt.evaluation.samples import continuations
    from daramgpt.export import restore_student
    from daramgpt.shards import Shards

    shards = Shards(run.shards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    say("evaluation: loading the models")
    models: dict[str, Model] = {}
    sizes: dict[str, tuple[int, int]] = {}
    writers: dict[str, Any] = {}
    teachers = _teachers(recipe, run, plan, device)
    for name, loaded in teachers.items():
        models[name], sizes[name] = loaded, (loaded.num_parameters, loaded.weight_bytes)
    if teachers:
        writers[TEACHER] = teachers[TEACHER].model
    for name, saved in ((STUDENT, student_saved), (BASELINE, baseline_saved)):
        if saved is not None:
            model: Any = restore_student(recipe.student, saved.weights(), shards.tokenizer_dir)
            model.to(device)
            models[name], writers[name] = CausalModel(model), model
            parameters = list(model.parameters())
            sizes[name] = (
                sum(parameter.numel() for parameter in parameters),
                sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            )
    stages = [stage.name for stage in shards.stages]
    say(f"evaluation: {', '.join(models)} on the held-out text of {counted(len(stages), 'stages')}")
    limit = recipe.evaluation.heldout_tokens
    pace = Pace(say, "evaluation", held_out_tokens(shards, limit))
    measured = compare(
        models,
        shards,
        stages,
        limit,
        teachers.get(TEACHER),
        # Models are measured on rows that look to them as those they were trained on.
        document_start_id=shards.eos_token_id if recipe.curriculum.attention == "document" else None,
        advance=pace.advance,
    )
    samples = continuations(
        writers,
        AutoTokenizer.from_pretrained(shards.tokenizer_dir),
        recipe.evaluation.prompts,
        recipe.evaluation.sample_tokens,
        recipe.seed,
        say,
    )
    return {
        "rows": [_row(name, *sizes[name], measured[name]) for name in models],
        "heldout": _heldout(shards, measured[STUDENT]),
        "forgetting": results_table.forgetting(entries(run.metrics), student_saved.state["step"]),
        "samples": samples,
        "state": "done" if _is_complete(recipe, student_saved, baseline_saved) else "partial",
        "step": student_saved.state["step"],
        "tokens": student_saved.state["tokens"],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "hardware": hardware.detect().describe(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }


def _teachers(recipe: Recipe, run: RunDirectory, plan: dict[str, Any], device: Any) -> dict[str, Any]:
    """The teacher at full precision, and in the precision the student learns from; none where there is no teacher."""
    from daramgpt import teacher

    model_dir = _teacher_dir(recipe, run)
    if model_dir is None:
        return {}
    full = teacher.load(model_dir, "fp32", teacher.DTYPES["fp32"], device, run.teacher_weights)
    found = {TEACHER: full}
    precision = plan["teacher_precision"]
    if precision not in (None, "fp32"):
        found[f"{TEACHER} {precision}"] = teacher.load(
            model_dir, precision, teacher.DTYPES[plan["dtype"]], device, run.teacher_weights
        )
    return found


def _teacher_dir(recipe: Recipe, run: RunDirectory) -> Path | None:
    if recipe.teacher is None:
        return None
    if recipe.teacher.model:
        from daramgpt import teacher

        return teacher.resolve(recipe.teacher.model, recipe.teacher.revision)
    model_dir = run.part("teacher").export
    if not (model_dir / "config.json").is_file():
        raise UserError(f"{model_dir} holds no teacher", f"train it first: python -m daramgpt train {recipe.name}")
    return model_dir


def _row(name: str, num_parameters: int, num_bytes: int, measured: Measured) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": num_parameters,
        "bytes": num_bytes,
        "bits_per_byte": measured.bits_per_byte,
        "kl_to_teacher": measured.kl_to_teacher,
        "top1_agreement": measured.top1_agreement,
        "tokens_per_second": measured.tokens_per_second,
    }


def _heldout(shards: Shards, measured: Measured) -> dict[str, dict[str, int]]:
    """What was measured on: the stage's held-out documents, and the text and tokens read of them."""
    return {stage.name: {"documents": stage.heldout_documents, **measured.text[stage.name]} for stage in shards.stages}


def _is_complete(recipe: Recipe, student_saved: Saved, baseline_saved: Saved | None) -> bool:
    saved = [student_saved, *([baseline_saved] if recipe.evaluation.baseline else [])]
    return all(one is not None and one.state["step"] >= one.state["num_steps"] for one in saved)


def _fingerprint(
    recipe: Recipe, plan: dict[str, Any], student_saved: Saved, baseline_saved: Saved | None
) -> dict[str, Any]:
    """All that decides what is measured."""
    elsewhere = {"points", "point_tokens", "plateau_stop", "finetuning", "zero_shot"}
    sections = ("seed", "corpus", "curriculum", "teacher")
    settings = recipe.model_dump_json(
        include={**dict.fromkeys(sections, True), "evaluation": Evaluation.model_fields.keys() - elsewhere}
    )
    return {
        "student_sha256": student_saved.sha256,
        "baseline_sha256": baseline_saved.sha256 if baseline_saved else None,
        "recipe_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        "teacher_precision": plan["teacher_precision"],
    }


def _standing(run: RunDirectory, measured_from: dict[str, Any]) -> dict[str, Any] | None:
    """``evaluation.json`` where it measured the same, else None."""
    try:
        evaluation = parse_json(read_text(run.evaluation))
        if evaluation["measured_from"] != measured_from:
            return None
        # One that cannot be shown is measured again.
        results_table.format_evaluation(evaluation)
        return evaluation
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _plan(run: RunDirectory) -> dict[str, Any]:
    """The parts of ``plan.json`` that an evaluation depends on."""
    try:
        plan = parse_json(read_text(run.plan))
        return {key: plan[key] for key in ("dtype", "teacher_precision")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run.plan} is missing or broken", "plan the run first") from None
