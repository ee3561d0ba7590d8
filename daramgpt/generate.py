"""Text of a model, streamed as it is sampled.

A loop of its own instead of ``model.generate``: pieces come as an iterator without a second thread, and a piece is
never half a syllable. A byte-fallback tokenizer may spend three tokens on one Hangul syllable, and what a token adds
can depend on the one before it. So the tokens since the last piece are decoded together with those of that piece;
what is longer than that piece alone is new, and is held back while it ends in an unfinished character.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from daramgpt.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together hold this probability; 1 = all.
        top_k: draw from this many likeliest tokens; 0 = all.
        seed: of the drawing.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Writer:
    """A model that continues texts.

    Attributes:
        model: a causal language model of transformers, on the device that it is to compute on.
        tokenizer: its own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, model_dir: Path) -> Writer:
        """Of an exported directory, and nothing else; on the GPU where there is one.

        Raises:
            UserError: no model there.
        """
        if not (model_dir / "config.json").is_file():
            raise UserError(f"there is no model in {model_dir}", "export one first: python -m daramgpt export RECIPE")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from daramgpt.vector_math import choose_kernels

        disable_progress_bar()
        choose_kernels()
        try:
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
        except (OSError, ValueError) as error:
            raise UserError(f"{model_dir}: {str(error).splitlines()[0]}", "export the model again") from None
        return cls(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    def stream(self, prompt: str, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """As `stream`."""
        return stream(self.model, self.tokenizer, prompt, max_new_tokens, sampling)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """Continue a prompt with a loaded model until it ends the text or `max_new_tokens` are drawn.

    Text longer than the model's positions goes on from the last half of them.
    An empty prompt is the start of a document.

    Yields:
        Pieces of the continuation, each whole characters.
    """
    import torch

    end_id = tokenizer.eos_token_id
    # Documents are trained on one after another, so the end of one is what a beginning has before it.
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False) or [end_id]
    num_prompt_tokens = len(ids)
    max_positions = int(model.config.max_position_embeddings)
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    piece_start, piece_end = 0, len(ids)
    window, cache = ids[-(max_positions - 1) :], None
    # transformers 5.24 has renamed it, and warns of the old name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    while len(ids) - num_prompt_tokens < max_new_tokens:
        held = 0 if cache is None else cache.get_seq_length()
        if held + len(window) > max_positions:
            window, cache = ids[-(max_positions // 2) :], None
        with torch.inference_mode():
            output = model(torch.tensor([window], device=model.device), use_cache=True, **{name: cache})
        next_id = draw(output.logits[0, -1], sampling, generator)
        if next_id == end_id:
            break
        ids.append(next_id)
        window, cache = [next_id], getattr(output, name)
        piece = _decode(tokenizer, ids[piece_start:piece_end])
        text = _decode(tokenizer, ids[piece_start:])
        if len(text) > len(piece) and not text.endswith(UNFINISHED):
            yield text[len(piece) :]
            piece_start, piece_end = piece_end, len(ids)


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from logits [V]; nucleus sampling after Holtzman et al., arXiv 1904.09751."""
    import torch

    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V, ids_V = torch.softmax(logits_V.float() / sampling.temperature, -1).sort(descending=True)
    # The token that crosses top_p still counts: what lies before each token decides.
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    probabilities_V[before_V >= sampling.top_p] = 0
    if sampling.top_k:
        probabilities_V[sampling.top_k :] = 0
    # multinomial divides by the sum itself; rounding of that sum must not be able to leave nothing to draw.
    assert probabilities_V[0] > 0
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # Clean-up of spaces before punctuation is meant for English and would make text shorter after the fact.
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
