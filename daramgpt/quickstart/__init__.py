"""The embedded corpus: Korean text by a grammar of our own, written in the four real on-disk formats."""

from daramgpt.quickstart.corpus import write_corpus

__all__ = ["write_corpus"]
