"""What came out of a run: held-out bits per byte, closeness to the teacher, speed, and text to read.

`evaluate` measures the teacher at full precision and in its 8 bits, the student, and the same student without a
teacher where the recipe asks for one, and writes ``evaluation.json``. It names the checkpoints that were measured, so
that running again costs nothing. Importing this package is cheap: what computes is imported when it is called.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from daramgpt import results_table
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, parse_json, read_text, write_json

if TYPE_CHECKING:
    from daramgpt.checkpoint import Saved
    from daramgpt.evaluation.held_out import Measured, Model
    from daramgpt.shards import Shards

TEACHER, STUDENT, BASELINE = "teacher", "student", "student without teacher"


def evaluate(recipe: Recipe, run: RunDirectory, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the models of a run, print the result, and keep it in ``evaluation.json``.

    Returns:
        The content of that file; as it stands where the same checkpoints were measured before.

    Raises:
        UserError: there is no checkpoint of the student, no teacher, or no shards.
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
    measured_from = _fingerprint(recipe, plan, student_saved, baseline_saved)
    evaluation = _standing(run, measured_from)
    if evaluation is not None:
        say(f"evaluation: step {evaluation['step']:,} is measured already, {run.evaluation}")
    else:
        evaluation = _measure(recipe, run, plan, student_saved, baseline_saved, say)
        evaluation["measured_from"] = measured_from
        write_json(run.evaluation, evaluation)
    say(results_table.format_evaluation(evaluation))
    return evaluation


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
    from daramgpt.evaluation.held_out import CausalModel, compare
    from daramgpt.evaluation.samples import continuations
    from daramgpt.export import restore_student
    from daramgpt.shards import Shards

    shards = Shards(run.shards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
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
    say(f"evaluation: {', '.join(models)} on the held-out text of {len(stages)} stages")
    measured = compare(
        models,
        shards,
        stages,
        recipe.evaluation.heldout_tokens,
        teachers.get(TEACHER),
        # Models are measured on rows that look to them as those they were trained on.
        document_start_id=shards.eos_token_id if recipe.curriculum.attention == "document" else None,
    )
    samples = continuations(
        writers,
        AutoTokenizer.from_pretrained(shards.tokenizer_dir),
        recipe.evaluation.prompts,
        recipe.evaluation.sample_tokens,
        recipe.seed,
    )
    return {
        "rows": [_row(name, *sizes[name], measured[name]) for name in models],
        "heldout": _heldout(shards, measured[STUDENT]),
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

    if recipe.teacher is None:
        return {}
    if recipe.teacher.model:
        model_dir = teacher.resolve(recipe.teacher.model, recipe.teacher.revision)
    else:
        model_dir = run.part("teacher").export
        if not (model_dir / "config.json").is_file():
            raise UserError(f"{model_dir} holds no teacher", f"train it first: python -m daramgpt train {recipe.name}")
    full = teacher.load(model_dir, "fp32", teacher.DTYPES["fp32"], device, run.teacher_weights)
    found = {TEACHER: full}
    precision = plan["teacher_precision"]
    if precision not in (None, "fp32"):
        found[f"{TEACHER} {precision}"] = teacher.load(
            model_dir, precision, teacher.DTYPES[plan["dtype"]], device, run.teacher_weights
        )
    return found


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
    settings = recipe.model_dump_json(include={"seed", "corpus", "curriculum", "teacher", "evaluation"})
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
        return evaluation if evaluation["measured_from"] == measured_from else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plan(run: RunDirectory) -> dict[str, Any]:
    """The parts of ``plan.json`` that an evaluation depends on."""
    try:
        plan = parse_json(read_text(run.plan))
        return {key: plan[key] for key in ("dtype", "teacher_precision")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run.plan} is missing or broken", "plan the run first") from None
