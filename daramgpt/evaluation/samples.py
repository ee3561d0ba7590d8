"""Continuations of the recipe's prompts, by each model with the same draws, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from daramgpt.generate import Sampling, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continuations(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str],
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, str]]:
    """``{prompt, model, text}`` for every prompt and model; `text` is what follows the prompt."""
    return [
        {
            "prompt": prompt,
            "model": name,
            "text": "".join(stream(model, tokenizer, prompt, max_new_tokens, Sampling(seed=seed))),
        }
        for prompt in prompts
        for name, model in models.items()
    ]
