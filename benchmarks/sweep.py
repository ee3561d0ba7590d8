"""What settings make of the same tokens: several students of one teacher, trained side by side on the same rows.

    python -m benchmarks.sweep --teacher DIR --corpus DIR --heldout DIR --variant "NAME key=value ..." [--variant ...]
                               [--seeds N] [--baseline NAME] [--scale S] [--student W/H/B] [--points N]
                               [--heldout-every N] [--threads N] [--work DIR] [--json FILE]

A variant is the recipe `daramgpt` with other values of its keys, of which those of the loss, the optimizer, the
schedule and the student's beginning are looked at. The teacher, by far the dearest, computes each row once for all of
them. ``optimizer=muon`` has the matrices of the blocks trained by torch's Muon, all else by AdamW.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, machine
from benchmarks.quality_runs import format_gaps, gap_closed, make_recipe, parse_shape, prepared
from daramgpt.errors import UserError

MICRO_ROWS = 4
MUON = "optimizer=muon"


@dataclass(frozen=True)
class Variant:
    """A student and what it is trained with; see `Trainee`."""

    name: str
    overrides: tuple[str, ...]
    is_muon: bool

    @classmethod
    def read(cls, text: str) -> Variant:
        """Of ``"NAME key=value ..."``.

        Raises:
            UserError: there is no name.
        """
        words = shlex.split(text)
        if not words or "=" in words[0]:
            raise UserError(f'--variant "{text}" has no name', 'write it as "NAME key=value key=value"')
        return cls(words[0], tuple(word for word in words[1:] if word != MUON), MUON in words)


class Trainee:
    """One student.

    Args:
        variant: of the command line.
        recipe: with its overrides.
        shards: of the run.
        weights: that it begins with, by ``student.init``.
        teacher: frozen, in fp32.
    """

    def __init__(self, variant: Variant, recipe: Any, shards: Any, weights: Any, teacher: Any) -> None:
        import torch

        from daramgpt import initialisation, student
        from daramgpt.blocks import block_pairs, blocks_of
        from daramgpt.engine import DistillationModel, client_optimizer
        from daramgpt.shards import Feed
        from daramgpt.train import Horizon

        self.variant, self._settings = variant, recipe
        self.model = student.build(
            recipe.student, shards.vocab_size, shards.context_tokens, shards.eos_token_id, recipe.seed
        )
        if weights is not None:
            self.model.load_state_dict(weights, strict=False)
        pairs: list[tuple[int, int]] = []
        if recipe.loss.hidden_weight:
            pairs = block_pairs(recipe.loss.hidden_blocks, recipe.student.n_layer, len(blocks_of(teacher.model)))
        self.blocks = [other for _, other in pairs]
        width = teacher.head_weight.shape[1]
        self._module = DistillationModel(
            self.model, recipe.loss, MICRO_ROWS * shards.context_tokens, False, width, [own for own, _ in pairs]
        )
        if weights is not None and pairs:
            rows = initialisation.calibration_rows(shards, recipe.student.calibration_tokens, recipe.seed)
            self._module.take_along(initialisation.fit_projections(teacher, self.model, rows, pairs, lambda: None))
        self._optimizers: list[Any] = [client_optimizer(self._module, recipe.optimizer, is_offloaded=False)]
        if variant.is_muon:
            self._optimizers = self._with_muon(torch, recipe.optimizer)
        batch_rows = max(1, recipe.optimizer.batch_tokens // shards.context_tokens // MICRO_ROWS) * MICRO_ROWS
        self._feed = Feed(shards, batch_rows, MICRO_ROWS, 0, 1, 1, recipe.seed)
        self._horizon, self._steps, self._micro = Horizon(self._feed.num_steps), 0, 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def label(self) -> str:
        """Variant and seed."""
        return f"{self.variant.name} {self._settings.seed}"

    @property
    def row(self) -> dict[str, Any]:
        """Of the result."""
        variant = self.variant
        return {
            "name": variant.name,
            "seed": self._settings.seed,
            "settings": list(variant.overrides),
            "muon": variant.is_muon,
            **self.curve[-1],
            "curve": self.curve,
        }

    def _with_muon(self, torch: Any, settings: Any) -> list[Any]:
        matrices = [value for name, value in self._module.named_parameters() if ".h." in name and value.dim() == 2]
        groups = self._optimizers[0].param_groups
        taken = {id(value) for value in matrices}
        for group in groups:
            group["params"] = [value for value in group["params"] if id(value) not in taken]
        muon = torch.optim.Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            # So that AdamW's learning rate is one for it too (Liu et al., arXiv 2502.16982).
            adjust_lr_fn="match_rms_adamw",
        )
        return [*self._optimizers, muon]

    def take(self, input_ids: Any, labels: Any, hidden: Any, states: dict[int, Any], teacher: Any) -> None:
        """The next micro-batch of the run, and a step where its batch is full."""
        began = time.monotonic()
        own = [states[number] for number in self.blocks]
        loss, *_ = self._module(input_ids, labels, hidden, teacher.head_weight, teacher.head_bias, own)
        (loss / self._feed.num_targets(self._steps)).backward()
        self._micro += 1
        if self._micro == self._feed.micro_batches:
            self._step()
        self.seconds += time.monotonic() - began

    def finish(self) -> None:
        """The last step, whose batch the rows may not have filled."""
        if self._micro:
            self._step()

    def _step(self) -> None:
        import torch

        from daramgpt.train import learning_rate

        settings = self._settings
        if settings.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._module.parameters(), settings.optimizer.clip_norm)
        rate = learning_rate(settings.optimizer.learning_rate, settings.schedule, self._steps, self._horizon)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self._steps, self._micro = self._steps + 1, 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result without hardware and versions.

    Raises:
        UserError: of the recipe's keys, the teacher, the corpora.
    """
    import torch

    from benchmarks.quality_yardstick import ALL, read
    from daramgpt import recipe as recipes
    from daramgpt import teacher
    from daramgpt.evaluation.held_out import CausalModel, compare
    from daramgpt.shards import Feed, Shards

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "sweep.toml"
    file.write_text(make_recipe(arguments.teacher, arguments.corpus, parse_shape(arguments.student)), encoding="utf-8")
    variants = [Variant.read(text) for text in arguments.variant]
    if arguments.baseline is not None and arguments.baseline not in {variant.name for variant in variants}:
        raise UserError(f"--baseline: there is no variant {arguments.baseline}", "give the name of one")
    # A wrong key shows before anything is prepared.
    settings = {variant.name: recipes.load(str(file), list(variant.overrides)) for variant in variants}
    if any(one.student.init == "layers" for one in settings.values()):
        raise UserError("--variant: a sweep knows no student.init=layers", "give random, projected or pruned")
    run = prepared(file, work / f"scale-{arguments.scale:g}", [f"curriculum.scale={arguments.scale}"], ("prepare",))
    shards = Shards(run / "shards")
    yardstick = read(
        arguments.heldout,
        shards.tokenizer_dir,
        shards.eos_token_id,
        shards.context_tokens,
        arguments.heldout_every,
    )
    frozen = teacher.load(arguments.teacher, "fp32")
    weights = _Beginnings(frozen, shards)
    trainees: list[Trainee] = []
    for seed in range(arguments.seeds):
        for variant in variants:
            seeded = settings[variant.name].model_copy(update={"seed": seed})
            trainees.append(Trainee(variant, seeded, shards, weights(seeded), frozen))
    blocks = sorted({number for one in trainees for number in one.blocks})
    feed = Feed(shards, MICRO_ROWS, MICRO_ROWS, 0, 1, 1, 0)
    models = {one.label: CausalModel(one.model) for one in trainees}
    tokens, teacher_seconds = 0, 0.0

    def point() -> None:
        found = compare(models, yardstick, [ALL], sys.maxsize, None, None)
        for one in trainees:
            value = found[one.label].bits_per_byte[ALL]
            assert value is not None
            seconds = teacher_seconds + one.seconds
            one.curve.append({"seconds": seconds, "tokens": tokens, "bits_per_byte": value})
        figures = ", ".join(f"{one.label} {one.curve[-1]['bits_per_byte']:.4f}" for one in trainees)
        command.progress(f"{tokens:,} tokens: {figures}")

    point()
    for step in range(feed.num_steps):
        input_ids, labels = feed.batch(step, 0)
        began = time.monotonic()
        hidden, states = frozen.states(input_ids, blocks)
        teacher_seconds += time.monotonic() - began
        for one in trainees:
            one.take(input_ids, labels, hidden, dict(zip(blocks, states, strict=True)), frozen)
        tokens += feed.num_targets(step)
        if step + 1 == feed.num_steps:
            for one in trainees:
                one.finish()
        if (step + 1) * arguments.points // feed.num_steps > step * arguments.points // feed.num_steps:
            point()
    known = compare({"teacher": frozen}, yardstick, [ALL], sys.maxsize, None, None)["teacher"].bits_per_byte[ALL]
    assert known is not None
    rows = [one.row for one in trainees]
    names = [variant.name for variant in variants if variant.name != arguments.baseline]
    closed = {} if arguments.baseline is None else gap_closed(rows, known, arguments.baseline, names)
    return {
        "heldout_text_bytes": yardstick.text_bytes,
        "teacher_bits_per_byte": known,
        "rows": rows,
        "baseline": arguments.baseline,
        "gap_closed": closed,
    }


class _Beginnings:
    """Weights that students begin with, made once a kind.

    Args:
        teacher: frozen, in fp32.
        shards: of the run.
    """

    def __init__(self, teacher: Any, shards: Any) -> None:
        self._teacher, self._shards = teacher, shards
        self._found: dict[str, Any] = {}

    def __call__(self, recipe: Any) -> Any:
        """By transformers' names; None = random ones."""
        from daramgpt import initialisation, student

        if recipe.student.init == "random":
            return None
        key = f"{recipe.seed} {recipe.student.model_dump_json()}"
        if key not in self._found:
            shards = self._shards
            model = student.build(
                recipe.student, shards.vocab_size, shards.context_tokens, shards.eos_token_id, recipe.seed
            )
            rows = initialisation.calibration_rows(shards, recipe.student.calibration_tokens, recipe.seed)
            make = initialisation.project if recipe.student.init == "projected" else initialisation.prune
            make(self._teacher.model, model, rows, command.progress, lambda: None)
            self._found[key] = model.state_dict()
        return self._found[key]


def format_result(result: dict[str, Any]) -> str:
    """A line a variant."""
    lines = [
        (
            row["name"],
            str(row["seed"]),
            " ".join(row["settings"]) + (f" {MUON}" if row["muon"] else ""),
            f"{row['seconds']:,.0f}",
            f"{row['tokens'] / 1e6:,.2f} M",
            f"{row['curve'][0]['bits_per_byte']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        )
        for row in result["rows"]
    ]
    table = machine.format_table(("", "seed", "settings", "seconds", "tokens", "at first", "bits/byte"), lines)
    parts = [table, f"teacher {result['teacher_bits_per_byte']:.4f} bits per byte", *format_gaps(result["gap_closed"])]
    return "\n".join(parts)


def main(given: Sequence[str] | None = None) -> int:
    parser = command.parser("sweep", __doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="directory of a GPT-2")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the four corpora")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of .txt files that neither has seen")
    parser.add_argument("--variant", action="append", required=True, metavar='"NAME KEY=VALUE ..."')
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0, each variant is trained with")
    parser.add_argument("--baseline", metavar="NAME", help="variant from which the gap to the teacher is counted")
    parser.add_argument("--student", default="128/4/2", help="n_embd/n_head/n_layer")
    parser.add_argument("--scale", type=float, default=0.05, help="of the curriculum")
    parser.add_argument("--points", type=int, default=6, help="times that the students are measured")
    parser.add_argument("--heldout-every", type=int, default=1, help="only every so many-th document of each file")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"), help="folder of the shards")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(given)
    return command.run(lambda: measure(arguments), format_result, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
