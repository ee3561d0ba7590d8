"""Count the sentences of a web corpus by their length in tokens: the histogram that the reference loop pads by.

Only the counts are kept, never text: ``data/sentence_lengths.json`` is what this wrote, and what
``benchmarks.throughput`` reads.

    python -m benchmarks.sentence_lengths --corpus DIR --tokenizer DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from daramgpt.corpora import ReadReport, find, read
from daramgpt.curriculum import cut
from daramgpt.run_directory import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

HISTOGRAM = Path(__file__).parent / "data" / "sentence_lengths.json"
# Sentences encoded in one call.
ENCODE_BATCH = 4096
# What a group of batches may differ by from what it stands for.
TOKENS_TOLERANCE, PADDING_TOLERANCE = 0.02, 0.005


@dataclass(frozen=True)
class SentenceLengths:
    """How many sentences have how many tokens.

    Attributes:
        counts: sentences by length in tokens, the end-of-text token left out.
    """

    counts: dict[int, int]

    def draw(self, num_sentences: int, longest: int, random: np.random.Generator) -> list[int]:
        """Lengths of sentences drawn with replacement, cut to `longest`."""
        import numpy as np

        lengths = np.array(list(self.counts))
        shares = np.array(list(self.counts.values())) / sum(self.counts.values())
        return np.minimum(random.choice(lengths, num_sentences, p=shares), longest).tolist()

    def expectation(self, batch: int, longest: int) -> tuple[float, float]:
        """Expected tokens and positions of a batch of independent draws, padded to its longest sentence.

        The longest of n draws is at most l with probability F(l)ⁿ, F being the share of sentences of up to l tokens.
        """
        num_sentences, up_to, tokens, longest_of_batch = sum(self.counts.values()), 0, 0.0, 0.0
        for length, count in sorted(self.counts.items()):
            before, up_to = (up_to / num_sentences) ** batch, up_to + count
            tokens += min(length, longest) * count / num_sentences
            longest_of_batch += min(length, longest) * ((up_to / num_sentences) ** batch - before)
        return batch * tokens, batch * longest_of_batch

    def padding_share(self, batch: int, longest: int) -> float:
        """Expected padding over expected positions, of batches padded to their longest sentence."""
        tokens, positions = self.expectation(batch, longest)
        return 1 - tokens / positions

    def representative(
        self, batch: int, batches: int, longest: int, padding_share: float, random: np.random.Generator
    ) -> Iterator[list[int]]:
        """Groups of batches, each of which has the mean length of all sentences and a given padding share.

        Groups are drawn one after the other; those are left out whose tokens are more than `TOKENS_TOLERANCE` away
        from their expectation, or their padding more than `PADDING_TOLERANCE` from what is asked for, on either side.

        Args:
            batch, batches: sentences of a batch, batches of a group.
            longest: tokens that a sentence is cut to.
            padding_share: of the positions of a group.
            random: the same gives the same groups.

        Yields:
            lengths of batch * batches sentences.
        """
        expected_tokens = self.expectation(batch, longest)[0] * batches
        while True:
            drawn = self.draw(batch * batches, longest, random)
            positions = sum(batch * max(drawn[start : start + batch]) for start in range(0, len(drawn), batch))
            tokens = sum(drawn)
            if (
                abs(tokens / expected_tokens - 1) <= TOKENS_TOLERANCE
                and abs(1 - tokens / positions - padding_share) <= PADDING_TOLERANCE
            ):
                yield drawn


def load() -> SentenceLengths:
    """The committed histogram."""
    counts = json.loads(HISTOGRAM.read_text(encoding="utf-8"))["counts"]
    return SentenceLengths({int(length): count for length, count in counts.items()})


def token_lengths(sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Tokens of each sentence, in order; empty ones are left out."""
    rest = iter(sentences)
    while batch := list(itertools.islice(rest, ENCODE_BATCH)):
        yield from (len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"] if ids)


def padding_in_order(lengths: Sequence[int], batch: int) -> float:
    """Padding over positions, of batches of neighbours padded to their longest; the last, short batch left out."""
    batches = [lengths[start : start + batch] for start in range(0, len(lengths) - batch + 1, batch)]
    return 1 - sum(map(sum, batches)) / sum(batch * max(neighbours) for neighbours in batches)


def web_sentences(corpus_dir: Path) -> Iterator[str]:
    """Sentences of the web corpus as the curriculum cuts them."""
    for document in read(find(corpus_dir, "web", "web"), ReadReport()):
        for unit in cut(document, "sentence"):
            yield unit.strip()


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that holds web/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--json", type=Path, default=HISTOGRAM, help="file to write")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    in_order = list(token_lengths(web_sentences(arguments.corpus), tokenizer))
    lengths = SentenceLengths(dict(sorted(Counter(in_order).items())))
    write_histogram(lengths, tokenizer.vocab_size, arguments.json)
    num_sentences = sum(lengths.counts.values())
    num_tokens = sum(length * count for length, count in lengths.counts.items())
    print(f"{num_sentences:,} sentences, {num_tokens / num_sentences:.1f} tokens on average → {arguments.json}")
    for batch in (8, 16, 32, 64):
        print(
            f"padding at batch {batch}: {padding_in_order(in_order, batch):.1%} in the order of the text, "
            f"{lengths.padding_share(batch, max(in_order)):.1%} drawn independently"
        )


def write_histogram(lengths: SentenceLengths, vocab_size: int, path: Path) -> None:
    """The histogram and what it counts, a line a hundred lengths or so."""
    rows = ", ".join(f'"{length}": {count}' for length, count in lengths.counts.items())
    what = "sentence lengths in tokens of a Korean web corpus sample"
    text = f'{{"what": "{what}", "tokenizer_vocab_size": {vocab_size},\n"counts": {{{rows}}}}}\n'
    json.loads(text)
    write_atomically(path, text)


if __name__ == "__main__":
    main()
