"""Continuations of the recipe's prompts, by each model with the same draws, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from daramgpt.generate import Sampling, stream
from daramgpt.pace import Pace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continuations(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    say: Callable[[str], None],
) -> list[dict[str, str]]:
    """``{prompt, model, text}`` for every prompt and model; `text` is what follows the prompt."""
    found = []
    pace = Pace(say, "samples", len(prompts) * len(models))
    for prompt in prompts:
        for name, model in models.items():
            text = "".join(stream(model, tokenizer, prompt, max_new_tokens, Sampling(seed=seed)))
            found.append({"prompt": prompt, "model": name, "text": text})
            pace.advance(1)
    return found
