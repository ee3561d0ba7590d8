"""Sections of a recipe on the two models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from daramgpt.recipe.values import PathText, Section

Precision = Literal["auto", "llm-int8", "int8", "nf4", "bf16", "fp16", "fp32"]


class Shape(Section):
    """Shape of a GPT-2."""

    n_embd: int = Field(768, ge=8, le=2**20, description="width")
    n_head: int = Field(8, ge=1, le=2**20, description="attention heads")
    n_layer: int = Field(4, ge=1, le=10_000, description="blocks")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Shape:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        return self


class TeacherTraining(Shape):
    """A teacher that the run trains itself, from the same curriculum, by plain cross-entropy."""

    vocab_size: int = Field(ge=300, le=2**31 - 1, description="of the byte-fallback BPE trained from the corpus")
    passes: int = Field(1, ge=1, le=10**6, description="times it goes through the curriculum")
    learning_rate: float = Field(1e-3, gt=0)


class Teacher(Section):
    """The model whose distribution the student learns."""

    model: PathText | None = Field(None, description="local directory or hub id of a causal language model")
    revision: str | None = Field(None, description="of the hub id: a tag, branch or commit")
    train: TeacherTraining | None = Field(None, description="train the teacher first instead of loading one")
    precision: Precision = Field("auto", description="of its blocks; the head stays in 16 or 32 bits")
    half_accumulation: bool = Field(
        False, description="experiment for a P100: int8 rows, products accumulated in fp16, at twice the rate"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Teacher:
        if (self.model is None) == (self.train is None):
            raise ValueError("give either teacher.model or [teacher.train]")
        return self


class Student(Shape):
    """The model that is trained; vocabulary and tokenizer are the teacher's."""

    init: Literal["auto", "random", "projected", "pruned", "layers"] = Field(
        "random",
        description="start of the weights; projected: those of a GPT-2 teacher, fitted to the student's shape by least "
        "squares on text of the curriculum, in minutes; pruned: the channels, heads and neurons that such a teacher "
        "uses most on that text; layers: blocks of init_model; auto: projected where the teacher is a GPT-2 and no "
        "smaller than the student, else random",
    )
    init_model: PathText | None = Field(
        None,
        description='for init = "layers": local directory or hub id of a GPT-2 of the student\'s width and heads with '
        "the teacher's tokenizer",
    )
    calibration_tokens: int = Field(
        24_576, ge=1024, le=2**22, description="tokens of that text; memory and time grow with them"
    )

    @model_validator(mode="after")
    def _one_init_model(self) -> Student:
        if (self.init == "layers") != (self.init_model is not None):
            raise ValueError('give init_model with init = "layers", and only then')
        return self
