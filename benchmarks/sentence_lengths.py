"""Count the sentences of a web corpus by their length in tokens: the histogram that the reference loop pads by.

Only the counts are kept, never text: ``data/sentence_lengths.json`` is what this wrote, and what
``benchmarks.throughput`` reads.

    python -m benchmarks.sentence_lengths --corpus DIR --tokenizer DIR
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
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

    def padding_share(self, batch: int, longest: int, num_batches: int, random: np.random.Generator) -> float:
        """Share of the positions of batches padded to their longest sentence that are padding."""
        drawn = [self.draw(batch, longest, random) for _ in range(num_batches)]
        return 1 - sum(map(sum, drawn)) / sum(batch * max(lengths) for lengths in drawn)


def load() -> SentenceLengths:
    """The committed histogram."""
    counts = json.loads(HISTOGRAM.read_text(encoding="utf-8"))["counts"]
    return SentenceLengths({int(length): count for length, count in counts.items()})


def count_lengths(sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> SentenceLengths:
    """Sentences by their number of tokens; empty ones are left out."""
    counts: Counter[int] = Counter()
    batch: list[str] = []

    def flush() -> None:
        counts.update(len(ids) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"] if ids)
        batch.clear()

    for sentence in sentences:
        batch.append(sentence)
        if len(batch) == ENCODE_BATCH:
            flush()
    if batch:
        flush()
    return SentenceLengths(dict(sorted(counts.items())))


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
    lengths = count_lengths(web_sentences(arguments.corpus), tokenizer)
    write_histogram(lengths, tokenizer.vocab_size, arguments.json)
    num_sentences = sum(lengths.counts.values())
    num_tokens = sum(length * count for length, count in lengths.counts.items())
    print(f"{num_sentences:,} sentences, {num_tokens / num_sentences:.1f} tokens on average → {arguments.json}")


def write_histogram(lengths: SentenceLengths, vocab_size: int, path: Path) -> None:
    """The histogram and what it counts, a line a hundred lengths or so."""
    rows = ", ".join(f'"{length}": {count}' for length, count in lengths.counts.items())
    what = "sentence lengths in tokens of a Korean web corpus sample"
    text = f'{{"what": "{what}", "tokenizer_vocab_size": {vocab_size},\n"counts": {{{rows}}}}}\n'
    json.loads(text)
    write_atomically(path, text)


if __name__ == "__main__":
    main()
