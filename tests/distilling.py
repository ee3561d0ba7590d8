"""One tiny distillation, by the engine and by a plain PyTorch loop; as a program, by the engine on several ranks.

As a program it is one rank of those that RANK and WORLD_SIZE name: it takes a folder for its log and a file of `Case`
objects as JSON, and the first rank prints the losses of each. One process serves all cases, because it takes longer
to start than to train.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rank_processes import run_on_ranks

from daramgpt import student
from daramgpt.engine import Distiller, import_deepspeed, leave_ranks
from daramgpt.losses import distillation_loss_reference
from daramgpt.recipe import Loss, Optimizer, Shape
from daramgpt.teacher import Teacher

VOCAB, CONTEXT, MICRO_ROWS, MICRO_BATCHES, EOS, STEPS = 61, 12, 2, 4, 0, 5
SHAPE = Shape(n_embd=16, n_head=2, n_layer=2)
# Its larger matrices have more than the 4,096 numbers from which on their moments are kept in 8 bits.
WIDE = Shape(n_embd=64, n_head=2, n_layer=1)
LOSS = Loss(temperature=2.0, kd_weight=1.0, ce_weight=0.1)
# The teacher has one block, for which both of the student's stand.
COMPARING = Loss(hidden_weight=3.0, hidden_blocks=((1, 1), (2, 1)))
OPTIMIZER = Optimizer(learning_rate=3e-3, clip_norm=0.5, weight_decay=0.1)
ANSWER = "LOSSES "


def make_student(shape: Shape = SHAPE) -> Any:
    return student.build(shape, VOCAB, CONTEXT, EOS, seed=1)


def make_teacher() -> Teacher:
    model = student.build(Shape(n_embd=24, n_head=2, n_layer=1), VOCAB, CONTEXT, EOS, seed=2)
    model.eval().requires_grad_(False)
    # Sharper than a random model's nearly uniform distribution, so that the KL has something to teach.
    model.lm_head.weight.mul_(8)
    return Teacher(model, model.lm_head.weight, None, "fp32", 0, 0, CONTEXT)


def batch(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + micro)
    tokens = torch.randint(0, VOCAB, (MICRO_ROWS, CONTEXT + 1), generator=generator)
    tokens[tokens % 5 == 0] = EOS
    labels = tokens[:, 1:].clone()
    # Micro-batches of unequal weight: what a mean of means gets wrong.
    labels[0, : 3 * micro] = -100
    return tokens[:, :-1], labels


def num_targets(step: int) -> int:
    return sum(int((labels != -100).sum()) for _, labels in batches(step))


def batches(step: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return (batch(step, micro) for micro in range(rank, MICRO_BATCHES, world_size))


def documents(step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of a step, each a row of its own length."""
    for input_ids, labels in batches(step):
        for row, targets in zip(input_ids, labels, strict=True):
            starts = [place for place in range(1, CONTEXT) if row[place] == EOS]
            for piece in zip(row.tensor_split(starts), targets.tensor_split(starts), strict=True):
                yield piece[0][None], piece[1][None]


def plain_losses(teacher: Teacher, shape: Shape = SHAPE, parts: Any = batches, kind: str = "adamw") -> list[float]:
    """Losses of each step by transformers, the plain loss, torch's clipping, and torch's or bitsandbytes' AdamW.

    Args:
        parts: gives the rows of a step: `batches`, or `documents` to pass them one by one.
        kind: ``"adamw"``, ``"adamw-8bit"``, or ``"adamw-8bit-flat"``, which quantises the moments of all matrices, and
            of all vectors, end to end as ZeRO does.
    """
    from bitsandbytes.optim import AdamW8bit

    model = make_student(shape)
    members = [[p for p in model.parameters() if (p.dim() >= 2) is is_matrix] for is_matrix in (True, False)]
    stepped = members
    if kind == "adamw-8bit-flat":
        stepped = [[torch.nn.Parameter(torch.cat([p.detach().flatten() for p in group]))] for group in members]
    adam = (torch.optim.AdamW if kind == "adamw" else AdamW8bit)(
        [
            {"params": stepped[0], "weight_decay": OPTIMIZER.weight_decay},
            {"params": stepped[1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
    )
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        total = torch.zeros(())
        for input_ids, labels in parts(step):
            teacher_logits = teacher.hidden_states(input_ids) @ teacher.head_weight.T
            kd, ce = distillation_loss_reference(
                model(input_ids).logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten(), LOSS.temperature
            )
            loss = (LOSS.kd_weight * kd + LOSS.ce_weight * ce) / num_targets(step)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        if stepped is not members:
            for group, flats in zip(members, stepped, strict=True):
                flats[0].grad = torch.cat([p.grad.flatten() for p in group])
        adam.step()
        if stepped is not members:
            for group, flats in zip(members, stepped, strict=True):
                for p, part in zip(group, flats[0].detach().split([p.numel() for p in group]), strict=True):
                    p.data.copy_(part.view(p.shape))
        losses.append(float(total))
    return losses


def make_distiller(
    ds_config: dict[str, Any],
    teacher: Teacher | None,
    log: Path,
    model: Any = None,
    document_start_id: int | None = None,
    kind: str = "adamw",
    loss: Loss = LOSS,
) -> Distiller:
    optimizer, rows = OPTIMIZER.model_copy(update={"kind": kind}), MICRO_ROWS
    micro_batches = MICRO_BATCHES // int(os.environ.get("WORLD_SIZE", "1"))
    return Distiller(
        model or make_student(), loss, optimizer, ds_config, rows, micro_batches, 7, teacher, log, document_start_id
    )


def run_steps(distiller: Distiller, steps: Iterable[int], loss: Loss = LOSS) -> list[float]:
    losses = []
    for step in steps:
        rows = batches(step, distiller.rank, distiller.world_size)
        result = distiller.step(rows, num_targets(step), OPTIMIZER.learning_rate)
        losses.append(loss.total(result.kd, result.ce, result.hidden))
    return losses


def forget_moments(distiller: Distiller, steps: int) -> None:
    """Drop the optimizer's state as a restart without it would."""
    tensors = distiller.gather()
    for group in ("exp_avg", "exp_avg_sq"):
        tensors[group] = {name: torch.zeros_like(value) for name, value in tensors[group].items()}
    distiller.restore(tensors, steps, distiller.loss_scaler())


@dataclass(frozen=True)
class Case:
    """A training of `STEPS` steps.

    Attributes:
        ds_config: DeepSpeed's part.
        kind: of the optimizer.
        is_wide: whether the student has the shape `WIDE`.
        forgets: the optimizer's state is dropped after two steps.
        compares: hidden states too, as `COMPARING` says.
    """

    ds_config: dict[str, Any]
    kind: str = "adamw"
    is_wide: bool = False
    forgets: bool = False
    compares: bool = False

    def losses(self, teacher: Teacher, log: Path) -> list[float]:
        loss = COMPARING if self.compares else LOSS
        model = make_student(WIDE if self.is_wide else SHAPE)
        distiller = make_distiller(self.ds_config, teacher, log, model, kind=self.kind, loss=loss)
        losses = run_steps(distiller, range(2), loss)
        if self.forgets:
            forget_moments(distiller, 2)
        losses += run_steps(distiller, range(2, STEPS), loss)
        distiller.close()
        return losses


def losses_on(num_ranks: int, cases: dict[str, Case], folder: Path) -> dict[str, list[float]]:
    """Losses of each case, from as many processes as there are ranks.

    Raises:
        AssertionError: a rank failed, or they gave no answer in ten minutes.
    """
    given = folder / "cases.json"
    given.write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))
    said = run_on_ranks(__file__, num_ranks, folder, folder, given)
    return json.loads(said[0].rsplit(ANSWER, 1)[1].splitlines()[0])


def main() -> None:
    torch.set_num_threads(1)
    teacher = make_teacher()
    cases = {name: Case(**fields) for name, fields in json.loads(Path(sys.argv[2]).read_text()).items()}
    log = Path(sys.argv[1]) / f"log-{os.environ['RANK']}.txt"
    import_deepspeed(log)
    # DeepSpeed collects garbage at each beginning and end, which would go through all that is imported.
    gc.freeze()
    losses: dict[str, list[float]] = {}
    for name, case in cases.items():
        # Files that differ in what a case leaves out are the same training.
        same = next((other for other in losses if cases[other] == case), None)
        losses[name] = case.losses(teacher, log) if same is None else losses[same]
    if os.environ["RANK"] == "0":
        print(ANSWER + json.dumps(losses))
    leave_ranks()


if __name__ == "__main__":
    main()
