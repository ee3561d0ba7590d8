"""Token shards: corpora tokenised once, then read as rows of the context's length.

``prepare`` writes them, ``Shards`` opens them, ``Feed`` says which rows a step, rank and micro-batch gets,
``Prefetch`` has them on the device before they are needed.

A stage is one stream of tokens: EOS, first text, EOS, second text, EOS... The leading EOS lets the first token be
predicted like every other. Row i of context T has the inputs ``stream[i*T : i*T + T]`` and the targets
``stream[i*T + 1 : i*T + T + 1]``: rows overlap by one token, so each token of text is a target exactly once. The last
row of a stage is padded: its inputs by EOS, its labels by -100, which no loss counts.
"""

from daramgpt.shards.feed import Feed
from daramgpt.shards.prefetch import Prefetch
from daramgpt.shards.preparation import estimate_stages, prepare
from daramgpt.shards.rows import Shards, StageInfo

__all__ = ["Feed", "Prefetch", "Shards", "StageInfo", "estimate_stages", "prepare"]
