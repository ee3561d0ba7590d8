"""Rows of the curriculum to calibrate on."""

from __future__ import annotations

import numpy as np
import torch

from daramgpt.shards import Shards


def calibration_rows(shards: Shards, num_tokens: int, seed: int) -> torch.Tensor:
    """Whole rows drawn from all stages, by their share of the curriculum.

    Args:
        shards: of the run; held-out text is not in these rows.
        num_tokens: at least so many, if the shards have them.
        seed: of the draw.

    Returns:
        [R, T] int64.
    """
    total = sum(stage.num_rows for stage in shards.stages)
    wanted = min(total, -(-num_tokens // shards.context_tokens))
    rows = np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False))
    input_ids = np.full((wanted, shards.context_tokens), shards.eos_token_id, dtype=np.int64)
    labels = np.zeros_like(input_ids)
    for place, row in enumerate(rows):
        stage = shards.stage_of(int(row))
        shards.streams[stage].read(int(row) - shards.stages[stage].first_row, input_ids[place], labels[place])
    return torch.from_numpy(input_ids)
