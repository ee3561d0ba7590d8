"""Sections of a recipe on how the student is trained, within which hours, and what is kept and measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from daramgpt.recipe.tasks import FineTuning
from daramgpt.recipe.values import MOST, MOST_BATCH_TOKENS, MOST_HOURS, PathText, Section


class Loss(Section):
    """Of a token: kd_weight · T² · divergence of teacher and student at temperature T + ce_weight · cross-entropy, in
    nats, + hidden_weight · (1 - cosine of their hidden states)."""

    temperature: float = Field(2.0, gt=0)
    kd_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.1, ge=0)
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"] = Field(
        "forward-kl",
        description="teacher p, student q: KL(p ‖ q), KL(q ‖ p), generalised Jensen-Shannon, KL(p ‖ mixture)",
    )
    jsd_beta: float = Field(
        0.5, gt=0, lt=1, description="jsd: β of β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = βp + (1 − β)q"
    )
    skew_alpha: float = Field(0.1, gt=0, lt=1, description="skew-kl: α of KL(p ‖ αp + (1 − α)q)")
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="of the hidden-state loss: 1 - cosine between what a block of the teacher hands on and the "
        "student's own, carried to the teacher's width by a learned projection; the mean over hidden_blocks; 0 = off",
    )
    hidden_blocks: tuple[tuple[int, int], ...] | None = Field(
        None,
        min_length=1,
        description="pairs of a block of the student and the teacher's that it learns from, counted from 1, such as "
        "[[2, 12], [4, 24]]; none = all of the student's, evenly over the teacher's",
    )

    @field_validator("hidden_blocks")
    @classmethod
    def _each_block_once(cls, value: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        if value is None:
            return None
        if any(not 1 <= number <= MOST for pair in value for number in pair):
            raise ValueError("blocks are counted from 1")
        if len({own for own, _ in value}) < len(value):
            raise ValueError("a block of the student stands there twice")
        return value

    def total(self, kd: float, ce: float, hidden: float) -> float:
        """What is minimised, of its parts, each a mean over tokens."""
        return self.kd_weight * kd + self.ce_weight * ce + self.hidden_weight * hidden

    @property
    def formula(self) -> str:
        """For people, such as ``"1 · T² · KL(teacher ‖ student) at T = 2, + 0.1 · cross-entropy"``."""
        share = self.skew_alpha
        divergence = {
            "forward-kl": "KL(teacher ‖ student)",
            "reverse-kl": "KL(student ‖ teacher)",
            "jsd": f"JSD(teacher, student; β = {self.jsd_beta:g})",
            "skew-kl": f"KL(teacher ‖ {share:g} · teacher + {1 - share:g} · student)",
        }[self.divergence]
        parts = (
            f"{self.kd_weight:g} · T² · {divergence} at T = {self.temperature:g}, + {self.ce_weight:g} · cross-entropy"
        )
        if self.hidden_weight:
            parts += f" + {self.hidden_weight:g} · (1 - cosine of hidden states)"
        return parts


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw", "adamw-8bit", "deepspeed-cpu-adam"] = Field(
        "adamw",
        description="torch's own; bitsandbytes' with moments in 8 bits, a quarter of their memory; or DeepSpeed's for "
        "the CPU, which a C++ compiler builds at its first use (minutes)",
    )
    learning_rate: float = Field(6e-4, gt=0, description="at the plateau of the schedule")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; vectors are not decayed")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm; 0 = off")
    batch_tokens: int = Field(
        32768, ge=8, le=MOST_BATCH_TOKENS, description="tokens an optimizer step, all ranks together"
    )


class Schedule(Section):
    """Warm-up, stable, decay, counted in tokens (Hu et al., MiniCPM, arXiv 2404.06395)."""

    horizon: Literal["tokens", "hours"] = Field(
        "tokens",
        description="where the decay ends: with the curriculum, or where budget.budget_hours will be used up at the "
        "speed that was measured, placed anew where a session's end is recorded",
    )
    warmup_fraction: float = Field(0.01, ge=0, le=1, description="of all tokens, linear from 0")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="of all tokens, at the end, linear")
    final_ratio: float = Field(0.0, ge=0, le=1, description="of the learning rate at the very end")


class Engine(Section):
    """How the arithmetic is run; the plan freezes what is left to it here."""

    ds_config: PathText = Field("auto", description="a name in ds_configs/, a file, or auto")
    micro_batch_rows: int | None = Field(
        None, ge=1, le=MOST, description="rows a forward pass; none = the plan chooses"
    )
    loss_chunk_tokens: int | None = Field(
        None, ge=1, le=MOST, description="tokens the loss takes at a time; none = planned"
    )
    probe: Literal["auto", "off"] = Field(
        "auto",
        description="measure a few micro-batches before the plan is frozen; auto does where the run is long enough",
    )
    activation_checkpointing: bool = Field(
        False, description="compute the student's blocks once more in the backward pass instead of keeping activations"
    )
    compile: Literal["none", "loss", "all"] = Field(
        "none",
        description="what is done beside matrix products in fewer passes by torch.compile: the loss, or the blocks of "
        "both models too; needs compute capability 7.0 and Triton, or on a CPU a C++ compiler",
    )


class Checkpoint(Section):
    """What a killed session may lose, and what is kept."""

    every_minutes: float = Field(15.0, gt=0)
    keep: int = Field(2, ge=2, le=10**6)


class Persistence(Section):
    """Copies of checkpoints outside of the machine; the newest of all copies is what a session begins from."""

    directory: PathText | None = Field(None, description="folder of a mounted drive or volume, which has to be there")
    hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="private repository OWNER/NAME on the Hugging Face hub, made where it is not there",
    )
    after_save: str | None = Field(
        None, description="command that is run with each new checkpoint's path behind it (--after-save)"
    )


class Budget(Section):
    """Hours of training that a session and the whole run may take."""

    session_hours: float | None = Field(None, ge=1e-9, le=MOST_HOURS, description="of one session (--hours)")
    weekly_hours: float | None = Field(None, ge=1e-9, le=MOST_HOURS, description="of a week")
    week_begins: Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"] = Field(
        "saturday", description="at midnight UTC: when weekly_hours are given anew, as on Kaggle"
    )
    budget_hours: float = Field(284.0, ge=1e-9, le=MOST_HOURS, description="of the whole run")


class Evaluation(Section):
    """What is measured at the end, and on the way."""

    heldout_tokens: int = Field(200_000, ge=1, le=2**40, description="held-out tokens measured a stage, at most")
    points: int = Field(
        50,
        ge=0,
        le=10**6,
        description="times that the student is measured on the way, evenly over the curriculum; the end of each stage "
        "is one more, and 0 leaves out all of them",
    )
    point_tokens: int = Field(16_384, ge=1, le=2**40, description="held-out tokens measured a stage then, at most")
    plateau_stop: bool = Field(
        False,
        description="where the last stage's held-out text gains no more at a constant learning rate, begin the decay "
        "there instead of only saying so",
    )
    baseline: bool = Field(False, description="also train the same student without a teacher and compare")
    prompts: tuple[str, ...] = Field((), description="texts that are continued at the end")
    sample_tokens: int = Field(60, ge=1, le=10**6, description="tokens of a continuation")
    finetuning: FineTuning = Field(FineTuning(), description="where a folder of tasks is given (evaluate --tasks)")
    zero_shot: bool = Field(False, description="with that folder, KoBEST without fine-tuning too; needs lm-eval")
