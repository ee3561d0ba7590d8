"""Sections of a recipe on what is read: corpora and curriculum."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from daramgpt.recipe.values import MOST, MOST_BYTES, MOST_LETTERS, Bytes, PathText, Section


class Dataset(Section):
    """A corpus that `datasets.load_dataset` streams, from the Hugging Face hub or a local directory."""

    path: PathText = Field(description='id on the hub, such as "wikimedia/wikipedia", or a directory')
    config: str | None = Field(None, description='configuration of the data set, such as "20231101.ko"')
    split: str = Field("train", description="part of the data set")
    revision: str | None = Field(None, description="of the hub id: a tag, branch or commit")
    text_field: str = Field("text", description="column that holds the text")


class Corpus(Section):
    """Where the text comes from."""

    dir: PathText | None = Field(None, description="folder that holds the downloaded corpora (--corpus)")
    made_megabytes: float | None = Field(
        None, gt=0, le=1e6, description="make a corpus of this size by the built-in grammar when no folder is given"
    )
    formats: dict[str, str] = Field(
        default_factory=dict, description="format of a corpus, where its data or its name do not tell"
    )
    datasets: dict[str, Dataset] = Field(
        default_factory=dict, description="corpora that the datasets library streams instead of files in the folder"
    )
    splitters: dict[str, Literal["rules", "kiwi"]] = Field(
        default_factory=dict, description="sentence splitter of a corpus: rules, or kiwi for informal text"
    )
    strict: bool = Field(False, description="bad input is fatal instead of counted and named")
    workers: int | None = Field(None, ge=1, le=1024, description="processes that read and tokenise; none = one a core")

    def splitter(self, corpus: str) -> str:
        """Sentence splitter of a corpus by its name."""
        return self.splitters.get(corpus, "rules")


class Stage(Section):
    """One stretch of the curriculum."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=MOST_LETTERS, description="name in tables and file names"
    )
    corpus: str = Field(
        pattern=r"^[a-z0-9][a-z0-9-]*$",
        max_length=MOST_LETTERS,
        description="the corpus it reads, on from the stage before",
    )
    take: Bytes = Field(gt=0, le=MOST_BYTES, description='pure UTF-8 text, e.g. "600MB"')
    unit: Literal["sentence", "paragraph"] = Field(description="what a text is cut into")


class Curriculum(Section):
    """What is read, in which order, cut into rows of which length."""

    stages: tuple[Stage, ...] = Field(min_length=1, description="in the order in which they are trained")
    scale: float = Field(1.0, gt=0, le=1e9, description="shrinks the take of every stage alike")
    context_tokens: int = Field(1024, ge=8, le=2**24, description="tokens in a row; at most the teacher's positions")
    order: Literal["as-read", "shuffled"] = Field("as-read", description="of the rows within a stage")
    attention: Literal["causal", "document"] = Field(
        "causal", description="document: no attention across the texts that share a row, positions restart"
    )
    passes: int = Field(1, ge=1, le=10**6, description="times the whole curriculum is gone through")
    heldout_fraction: float = Field(0.005, ge=0, lt=0.5, description="documents never trained on, by hash of their id")
    heldout_documents: int = Field(
        4, ge=0, le=MOST, description="held-out documents a stage has at least, if the corpus allows"
    )

    @model_validator(mode="after")
    def _stage_names_differ(self) -> Curriculum:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have one name: {', '.join(names)}")
        return self
