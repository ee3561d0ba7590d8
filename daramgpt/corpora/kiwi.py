"""Sentence splitting by kiwipiepy, a morphological analyser, for text that leaves out its punctuation.

The analyser finds where sentences begin; the text between two beginnings is a sentence, so nothing can be lost. It is
read through a window that moves on to the last beginning found, for the analyser's memory grows with what it is given.

Measured with kiwipiepy 0.24.1 on one core, boundary F1 on gold sentences of UD Korean joined eight at a time:

====================================  =====  =====
text                                  kiwi   rules
====================================  =====  =====
edited (Kaist, 4,353 sentences)       .9963  .9999
mixed with informal (GSD, 1,939)      .9383  .9469
only those without a mark (503)       .783   .761
MB/s                                  0.11   20-40
====================================  =====  =====

So it pays for corpora of bare informal lines and nowhere else. Loading takes two to five seconds and half a gigabyte.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from daramgpt.errors import UserError

# Several times the longest sentence that means anything, and a few megabytes of the analyser's memory.
_WINDOW_CHARACTERS = 4096


def split_sentences_kiwi(text: str) -> list[str]:
    """Sentences of a paragraph, without outer white space; none is empty.

    Raises:
        UserError: kiwipiepy is not installed.
    """
    analyser = _analyser()
    sentences = []
    start = 0
    while start < len(text):
        end = min(start + _WINDOW_CHARACTERS, len(text))
        beginnings = [start + sentence.start for sentence in analyser.split_into_sents(text[start:end])][1:]
        if end < len(text) and not beginnings:
            # No sentence ends within the window: cut between two words, or anywhere where there are none.
            space = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            beginnings = [space if space > 0 else end]
        elif end == len(text):
            beginnings.append(end)
        for beginning in beginnings:
            if sentence := text[start:beginning].strip():
                sentences.append(sentence)
            start = beginning
    return sentences


@cache
def _analyser() -> Any:
    """The process's one analyser: loading its model takes seconds and hundreds of megabytes."""
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise UserError(
            "the kiwi sentence splitter needs kiwipiepy", ".venv/bin/python -m pip install kiwipiepy"
        ) from None
    return Kiwi(num_workers=1)
