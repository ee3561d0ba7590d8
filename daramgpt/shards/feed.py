"""Which rows a step is made of, and which of them a rank gets in a micro-batch.

Everything is a pure function of (seed, position): rows are numbered through the stages of a pass and through the
passes, and step s takes rows ``[s*B, (s + 1)*B)`` of that order, whatever the number of ranks or the micro-batch.
Within the step, row j goes to micro-batch m of rank r where ``m*world_size + r == j // micro_batch_rows``. To go on
from a step, nothing but its number is needed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from daramgpt.shards.rows import IGNORED, Shards

if TYPE_CHECKING:
    import torch


class Feed:
    """The rows of a run, for one rank.

    Args:
        shards: what is read.
        batch_rows: rows of an optimizer step, all ranks together; a multiple of `micro_batch_rows` * `world_size`.
        micro_batch_rows: rows of one forward pass of one rank.
        passes: times the curriculum is gone through.
        seed: of the order, where it is shuffled.
        order: ``"as-read"``, or ``"shuffled"``: each pass permutes the rows within each stage anew.

    Attributes:
        num_steps: in all passes. The last may be short of rows; those missing have only ignored labels.
        micro_batches: accumulation steps of a rank.
    """

    def __init__(
        self,
        shards: Shards,
        batch_rows: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        passes: int,
        seed: int,
        order: str = "as-read",
    ) -> None:
        assert batch_rows % (micro_batch_rows * world_size) == 0, (batch_rows, micro_batch_rows, world_size)
        assert 0 <= rank < world_size
        assert order in ("as-read", "shuffled"), order
        self._shards = shards
        self._batch_rows = batch_rows
        self._micro_batch_rows = micro_batch_rows
        self._rank, self._world_size = rank, world_size
        self._num_rows = passes * shards.num_rows
        self.num_steps = -(-self._num_rows // batch_rows)
        self.micro_batches = batch_rows // (micro_batch_rows * world_size)

        # Not state: a permutation follows from its arguments, it is only not worth making anew for every row.
        @lru_cache(maxsize=2)
        def permutation(number_of_pass: int, stage: int) -> NDArray[np.int64]:
            generator = np.random.default_rng([seed, number_of_pass, stage])
            return generator.permutation(shards.stages[stage].num_rows)

        self._permutation = permutation if order == "shuffled" else None

    @property
    def sha256(self) -> str:
        """Of the shards."""
        return self._shards.sha256

    def batch(self, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a micro-batch of this rank.

        Returns:
            input_ids [b, T] int64; labels [b, T] int64, the token after each input, -100 where it is not to count.
        """
        import torch

        assert 0 <= step < self.num_steps and 0 <= micro < self.micro_batches
        start = step * self._batch_rows + (micro * self._world_size + self._rank) * self._micro_batch_rows
        shape = (self._micro_batch_rows, self._shards.context_tokens)
        input_ids = np.full(shape, self._shards.eos_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for place, position in enumerate(range(start, min(start + self._micro_batch_rows, self._num_rows))):
            stage, row = self._locate(position)
            self._shards.streams[stage].read(row, input_ids[place], labels[place])
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def num_targets(self, step: int) -> int:
        """Labels that count in a step, all ranks together."""
        context_tokens = self._shards.context_tokens
        streams = self._shards.streams
        return sum(
            min(context_tokens, streams[stage].num_targets - row * context_tokens) for stage, row in self._rows(step)
        )

    def text_bytes(self, step: int) -> int:
        """Bytes of text credited to a step, all ranks together."""
        return sum(int(self._shards.streams[stage].text_bytes[row]) for stage, row in self._rows(step))

    def stage(self, step: int) -> str:
        """Name of the stage that a step begins in."""
        stage, _ = self._locate(step * self._batch_rows)
        return self._shards.stages[stage].name

    def place_in_stage(self, step: int) -> tuple[int, float]:
        """Number, from 1, of the stage that a step begins in, and the share of its rows before that step."""
        row = step * self._batch_rows % self._shards.num_rows
        number = self._shards.stage_of(row)
        stage = self._shards.stages[number]
        return number + 1, (row - stage.first_row) / stage.num_rows

    def stages_ended(self, step: int) -> list[str]:
        """Names of the stages whose last row, of this pass, is in a step."""
        start, num_rows = step * self._batch_rows, self._shards.num_rows
        last_rows = range(start, min(start + self._batch_rows, self._num_rows))
        ends = {stage.first_row + stage.num_rows - 1: stage.name for stage in self._shards.stages}
        return [ends[position % num_rows] for position in last_rows if position % num_rows in ends]

    def _rows(self, step: int) -> list[tuple[int, int]]:
        start = step * self._batch_rows
        return [self._locate(position) for position in range(start, min(start + self._batch_rows, self._num_rows))]

    def _locate(self, position: int) -> tuple[int, int]:
        """Stage and row in the stage at a position of the whole run."""
        number_of_pass, row = divmod(position, self._shards.num_rows)
        stage = self._shards.stage_of(row)
        row -= self._shards.stages[stage].first_row
        if self._permutation is not None:
            row = int(self._permutation(number_of_pass, stage)[row])
        return stage, row
