"""One fine-tuning: a task, a seed, so many epochs, with validation and test scores after each.

AdamW, a linear warm-up and a linear decay to zero; a batch is so many rows on one device, padded to its longest. On a
CPU the same seed gives the same scores.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from daramgpt.pace import Pace
from daramgpt.recipe import FineTuning
from daramgpt.tasks import metrics
from daramgpt.tasks.classifier import Classifier, padded
from daramgpt.tasks.data import Split, Task, TaskData
from daramgpt.tasks.encoding import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Say = Callable[[str], None]
MAX_GRAD_NORM = 1.0
# A backward pass is two forward passes.
TRAINING_PASSES = 3


def encode_splits(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    settings: FineTuning,
    max_positions: int,
    draw_seed: int,
    say: Say,
) -> dict[Split, list[Encoded]]:
    """Training, validation and test rows as tokens.

    Args:
        data: all rows; where there is no validation set, training rows are held out.
        max_positions: of the student.
        draw_seed: of the training rows that are held out and of those that are trained on.
    """
    rows = dict(data.rows)
    draw = random.Random(draw_seed)
    if "validation" not in rows:
        shuffled = rows["train"][:]
        draw.shuffle(shuffled)
        num_held_out = max(1, min(settings.validation_rows, len(shuffled) // 5))
        rows["validation"], rows["train"] = shuffled[:num_held_out], shuffled[num_held_out:]
    if settings.most_training_rows is not None and settings.most_training_rows < len(rows["train"]):
        rows["train"] = draw.sample(rows["train"], settings.most_training_rows)
    pace = Pace(say, f"{data.task.name}: tokenising", sum(map(len, rows.values())))
    max_tokens = min(settings.max_tokens, max_positions)
    return {
        split: encode(tokenizer, [data.task.example(row) for row in found], max_tokens, pace)
        for split, found in rows.items()
    }


def finetune(
    student: PreTrainedModel,
    task: Task,
    splits: dict[Split, list[Encoded]],
    settings: FineTuning,
    seed: int,
    pad_id: int,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    """Fine-tune a copy of a student and score it after every epoch.

    Returns:
        ``epochs`` with loss, validation and test scores; ``best_test``, the test scores of the epoch with the best of
        them, and ``chosen_on_validation``, those of the epoch with the best validation score, each by the task's
        metric and the first where several are best; seconds and rows a second.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _finetune(student, task, splits, settings, seed, pad_id, device, say)


def _finetune(
    student: PreTrainedModel,
    task: Task,
    splits: dict[Split, list[Encoded]],
    settings: FineTuning,
    seed: int,
    pad_id: int,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    from transformers import get_linear_schedule_with_warmup

    began = time.monotonic()
    model = Classifier(student, 1 if task.has_choices else task.num_labels, settings.dropout).to(device)
    train = splits["train"]
    num_steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(settings.warmup_fraction * num_steps), num_steps)
    order = torch.Generator().manual_seed(seed)
    tokens = {split: sum(row.num_tokens for row in rows) for split, rows in splits.items()}
    epoch_work = TRAINING_PASSES * tokens["train"] + tokens["validation"] + tokens["test"]
    pace = Pace(say, f"{task.name}, seed {seed}", settings.epochs * epoch_work)
    epochs: list[dict[str, Any]] = []
    training_seconds = test_seconds = 0.0
    for epoch in range(1, settings.epochs + 1):
        detail = f"epoch {epoch} of {settings.epochs}"
        phase = time.monotonic()
        model.train()
        loss_sum = 0.0
        for places in torch.randperm(len(train), generator=order).split(settings.batch_size):
            rows = [train[place] for place in places.tolist()]
            with _autocast(device):
                loss = F.cross_entropy(_scores(model, task, rows, pad_id, device), _labels(rows, device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += float(loss.detach()) * len(rows)
            pace.advance(TRAINING_PASSES * sum(row.num_tokens for row in rows), detail)
        training_seconds += time.monotonic() - phase
        validation = _score(model, task, splits["validation"], settings.batch_size, pad_id, device, pace, detail)
        phase = time.monotonic()
        test = _score(model, task, splits["test"], settings.batch_size, pad_id, device, pace, detail)
        test_seconds += time.monotonic() - phase
        mean_loss = loss_sum / len(train)
        loss_found = mean_loss if math.isfinite(mean_loss) else None
        epochs.append({"epoch": epoch, "loss": loss_found, "validation": validation, "test": test})
    best_test = max(epochs, key=lambda one: one["test"][task.metric])
    chosen = max(epochs, key=lambda one: one["validation"][task.metric])
    return {
        "epochs": epochs,
        "best_test": {"epoch": best_test["epoch"], **best_test["test"]},
        "chosen_on_validation": {"epoch": chosen["epoch"], **chosen["test"]},
        "rows": {split: len(rows) for split, rows in splits.items()},
        "seconds": round(time.monotonic() - began, 2),
        "training_rows_per_second": round(settings.epochs * len(train) / training_seconds, 1),
        "test_rows_per_second": round(settings.epochs * len(splits["test"]) / test_seconds, 1),
    }


def predict(
    model: Classifier,
    task: Task,
    rows: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    done: Callable[[int], None] = lambda tokens: None,
) -> list[int]:
    """Labels that a model gives to rows, in their order; rows of like length go together, so that little is padding."""
    model.eval()
    predicted = [0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda place: max(map(len, rows[place].ids)))
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            places = by_length[start : start + batch_size]
            batch = [rows[place] for place in places]
            with _autocast(device):
                found = _scores(model, task, batch, pad_id, device).argmax(-1).tolist()
            for place, label in zip(places, found, strict=True):
                predicted[place] = label
            done(sum(row.num_tokens for row in batch))
    return predicted


def _score(
    model: Classifier,
    task: Task,
    rows: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    pace: Pace,
    detail: str,
) -> dict[str, float]:
    predicted = predict(model, task, rows, batch_size, pad_id, device, lambda tokens: pace.advance(tokens, detail))
    return metrics.scores([row.label for row in rows], predicted)


def _scores(model: Classifier, task: Task, rows: Sequence[Encoded], pad_id: int, device: torch.device) -> torch.Tensor:
    """One score a row and label, [rows, labels], in fp32."""
    ids, lengths = padded([text for row in rows for text in row.ids], pad_id, device)
    return model(ids, lengths).float().view(len(rows), task.num_labels)


def _labels(rows: Sequence[Encoded], device: torch.device) -> torch.Tensor:
    return torch.tensor([row.label for row in rows], device=device)


def _parameter_groups(model: Classifier, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 where the device has it; its emulation elsewhere would be slow, and fp16 needs a loss scale."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
