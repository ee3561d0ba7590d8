"""A run, described: typed and validated settings, read from TOML and overridden by ``--set a.b=c``.

Every field is documented where it is declared; an unknown or misspelt key is refused by name. What a run used is
written back, resolved, as ``recipe.toml`` of its run directory, so that a run can be repeated from that file alone.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from daramgpt.errors import UserError
from daramgpt.run_directory import read_text

RECIPES_DIR = Path(__file__).parent / "recipes"
# No setting is beyond these, and arithmetic with them ends.
MOST, MOST_BYTES, MOST_HOURS, MOST_BATCH_TOKENS = 2**31 - 1, 10**15, 10**6, 2**28
MOST_LETTERS, MOST_PATH_BYTES, MOST_NAME_BYTES = 100, 4095, 255
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
Precision = Literal["auto", "llm-int8", "int8", "nf4", "bf16", "fp16", "fp32"]


def parse_bytes(value: Any) -> Any:
    """``"600MB"`` as a number of bytes, in powers of ten; numbers pass through.

    Raises:
        ValueError: the text is not a number followed by B, KB, MB or GB.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]?B)\s*", value, re.IGNORECASE)
    if not match:
        raise ValueError(f'a size such as "600MB" is needed, not "{value}"')
    return int(Decimal(match[1]) * UNITS[match[2].upper()])


def check_path(value: str) -> str:
    """What names a file or a folder, or may.

    Raises:
        ValueError: no file can have that name, it is in the home of a user that is not there, or links to itself.
    """
    data = value.encode()
    if b"\0" in data or len(data) > MOST_PATH_BYTES or any(len(name) > MOST_NAME_BYTES for name in data.split(b"/")):
        raise ValueError("that can be no path")
    try:
        Path(value).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"that can be no path: {error}") from None
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
PathText = Annotated[str, AfterValidator(check_path)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


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


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw", "adamw-8bit", "deepspeed-cpu-adam"] = Field(
        "adamw",
        description="torch's own; bitsandbytes' with moments in 8 bits, a quarter of their memory; or DeepSpeed's for "
        "the CPU, which a C++ compiler builds at its first use (minutes)",
    )
    learning_rate: float = Field(6e-4, gt=0, description="at the plateau of the schedule")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; vectors are not decayed")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm; 0 = off")
    batch_tokens: int = Field(
        32768, ge=8, le=MOST_BATCH_TOKENS, description="tokens an optimizer step, all ranks together"
    )


class Schedule(Section):
    """Warm-up, stable, decay, counted in tokens (Hu et al., MiniCPM, arXiv 2404.06395)."""

    horizon: Literal["tokens", "hours"] = Field(
        "tokens",
        description="where the decay ends: with the curriculum, or where budget.budget_hours will be used up at the "
        "speed that was measured, placed anew where a session's end is recorded",
    )
    warmup_fraction: float = Field(0.01, ge=0, le=1, description="of all tokens, linear from 0")
    decay_fraction: float = Field(0.2, ge=0, le=1, description="of all tokens, at the end, linear")
    final_ratio: float = Field(0.0, ge=0, le=1, description="of the learning rate at the very end")


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

    init: Literal["random"] = Field("random", description="start of the weights")


class Loss(Section):
    """kd_weight · T² · divergence of teacher and student at temperature T + ce_weight · cross-entropy, nats a token."""

    temperature: float = Field(2.0, gt=0)
    kd_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.1, ge=0)
    divergence: Literal["forward-kl", "reverse-kl", "jsd", "skew-kl"] = Field(
        "forward-kl",
        description="teacher p, student q: KL(p ‖ q), KL(q ‖ p), generalised Jensen-Shannon, KL(p ‖ mixture)",
    )
    jsd_beta: float = Field(
        0.5, gt=0, lt=1, description="jsd: β of β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = βp + (1 − β)q"
    )
    skew_alpha: float = Field(0.1, gt=0, lt=1, description="skew-kl: α of KL(p ‖ αp + (1 − α)q)")

    @property
    def formula(self) -> str:
        """For people, such as ``"1 · T² · KL(teacher ‖ student) at T = 2, + 0.1 · cross-entropy"``."""
        share = self.skew_alpha
        divergence = {
            "forward-kl": "KL(teacher ‖ student)",
            "reverse-kl": "KL(student ‖ teacher)",
            "jsd": f"JSD(teacher, student; β = {self.jsd_beta:g})",
            "skew-kl": f"KL(teacher ‖ {share:g} · teacher + {1 - share:g} · student)",
        }[self.divergence]
        return (
            f"{self.kd_weight:g} · T² · {divergence} at T = {self.temperature:g}, + {self.ce_weight:g} · cross-entropy"
        )


class Engine(Section):
    """How the arithmetic is run; the plan freezes what is left to it here."""

    ds_config: PathText = Field("auto", description="a name in ds_configs/, a file, or auto")
    micro_batch_rows: int | None = Field(
        None, ge=1, le=MOST, description="rows a forward pass; none = the plan chooses"
    )
    loss_chunk_tokens: int | None = Field(
        None, ge=1, le=MOST, description="tokens the loss takes at a time; none = planned"
    )
    probe: Literal["auto", "off"] = Field(
        "auto",
        description="measure a few micro-batches before the plan is frozen; auto does where the run is long enough",
    )
    activation_checkpointing: bool = Field(
        False, description="compute the student's blocks once more in the backward pass instead of keeping activations"
    )
    compile: Literal["none", "loss", "all"] = Field(
        "none",
        description="what is done beside matrix products in fewer passes by torch.compile: the loss, or the blocks of "
        "both models too; needs compute capability 7.0 and Triton, or on a CPU a C++ compiler",
    )


class Checkpoint(Section):
    """What a killed session may lose, and what is kept."""

    every_minutes: float = Field(15.0, gt=0)
    keep: int = Field(2, ge=2, le=10**6)


class Persistence(Section):
    """Copies of checkpoints outside of the machine; the newest of all copies is what a session begins from."""

    directory: PathText | None = Field(None, description="folder of a mounted drive or volume, which has to be there")
    hub: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="private repository OWNER/NAME on the Hugging Face hub, made where it is not there",
    )
    after_save: str | None = Field(
        None, description="command that is run with each new checkpoint's path behind it (--after-save)"
    )


class Budget(Section):
    """Hours of training that a session and the whole run may take."""

    session_hours: float | None = Field(None, ge=1e-9, le=MOST_HOURS, description="of one session (--hours)")
    weekly_hours: float | None = Field(None, ge=1e-9, le=MOST_HOURS, description="of a week")
    week_begins: Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"] = Field(
        "saturday", description="at midnight UTC: when weekly_hours are given anew, as on Kaggle"
    )
    budget_hours: float = Field(284.0, ge=1e-9, le=MOST_HOURS, description="of the whole run")


class Evaluation(Section):
    """What is measured at the end."""

    heldout_tokens: int = Field(200_000, ge=1, le=2**40, description="held-out tokens measured a stage, at most")
    baseline: bool = Field(False, description="also train the same student without a teacher and compare")
    prompts: tuple[str, ...] = Field((), description="texts that are continued at the end")
    sample_tokens: int = Field(60, ge=1, le=10**6, description="tokens of a continuation")


class Recipe(Section):
    """A run from corpus to exported student."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MOST_LETTERS, description="default: the file's name"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of everything that is drawn")
    corpus: Corpus = Corpus()
    curriculum: Curriculum
    teacher: Teacher | None = None
    student: Student = Student()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    persistence: Persistence = Persistence()
    budget: Budget = Budget()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _has_teacher(self) -> Recipe:
        # Only the parts of a run, which are not read from a file, do without one.
        if self.teacher is None:
            raise ValueError("there is no [teacher]; give teacher.model, or [teacher.train]")
        return self

    @model_validator(mode="after")
    def _has_one_training_for_its_hours(self) -> Recipe:
        has_parts = self.evaluation.baseline or (self.teacher is not None and self.teacher.train is not None)
        if self.schedule.horizon == "hours" and has_parts:
            raise ValueError(
                'schedule.horizon = "hours" needs all hours for one training; '
                "give teacher.model and set evaluation.baseline = false"
            )
        return self

    def reads_files(self) -> bool:
        """Whether any corpus is read from the folder; data sets are not."""
        return any(stage.corpus not in self.corpus.datasets for stage in self.curriculum.stages)

    def teacher_part(self) -> Recipe:
        """The run in ``parts/teacher``: the teacher of this recipe, trained by plain cross-entropy."""
        assert self.teacher is not None and self.teacher.train is not None
        train = self.teacher.train
        return self._part(
            "teacher",
            student=Student(n_embd=train.n_embd, n_head=train.n_head, n_layer=train.n_layer),
            curriculum=self.curriculum.model_copy(update={"passes": train.passes}),
            optimizer=self.optimizer.model_copy(update={"learning_rate": train.learning_rate}),
        )

    def baseline_part(self) -> Recipe:
        """The run in ``parts/baseline``: this recipe's student, same tokens and schedule, without a teacher."""
        return self._part("baseline")

    def _part(self, name: str, **changes: Any) -> Recipe:
        return self.model_copy(
            update={
                "name": f"{self.name}-{name}",
                "teacher": None,
                "loss": Loss(temperature=1.0, kd_weight=0.0, ce_weight=1.0),
                "evaluation": self.evaluation.model_copy(update={"baseline": False}),
                **changes,
            }
        )


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def load(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a name from `recipe_names`, or a path ending in ``.toml``.
        overrides: ``"section.key=value"``; the value is TOML, or else taken as text.

    Raises:
        UserError: no such recipe, broken TOML, unknown key, value out of range; names the key.
    """
    path = Path(source) if source.endswith(".toml") else RECIPES_DIR / f"{source}.toml"
    try:
        data = tomllib.loads(read_text(path))
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UserError(
            f'there is no recipe "{source}"{reason}',
            f"use one of {', '.join(recipe_names())}, or the path of a .toml file",
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}", "correct the TOML there") from None
    data.setdefault("name", path.stem)
    for override in overrides or []:
        _apply(data, override)
    return validate(data, str(path) if source.endswith(".toml") else f"recipe {source}")


def validate(data: dict[str, Any], where: str) -> Recipe:
    """`Recipe` from plain data.

    Raises:
        UserError: names `where` and the first key at fault, and the nearest key that exists.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        # A misspelt key first: the key that it leaves missing is the same fault.
        faults = error.errors(include_input=False, include_url=False)
        first = min(faults, key=lambda one: one["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), _keys_beside(first["loc"]), n=1)
            mend = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(_keys_beside(first['loc']))}"
            raise UserError(f'{where}: unknown key "{key}"', mend) from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{where}: {key or 'recipe'}: {message}", f"correct {key or 'it'} (--set or the file)"
        ) from None


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    """Keys that the section of an unknown key does have."""
    model: Any = Recipe
    parts = iter(location[:-1])
    for part in parts:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        if get_origin(annotation) is dict:
            # The user's own name stands between.
            next(parts, None)
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f'--set "{override}" is not key=value', "write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *sections, last = key.strip().split(".")
    table = data
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f'--set {key}: "{section}" holds no keys', "write it as section.key=value")
    table[last] = value
    # Naming a teacher replaces the one that the recipe would train.
    if key.strip() == "teacher.model":
        table.pop("train", None)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML that `load` reads back to an equal one; unset fields are left out."""
    return "\n".join(_toml_lines(recipe.model_dump(mode="json", exclude_none=True), ())) + "\n"


def _toml_lines(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    arrays = {
        key: value for key, value in table.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    }
    for key, value in table.items():
        if key not in tables and key not in arrays:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in tables.items():
        name = (*path, _toml_key(key))
        yield f"\n[{'.'.join(name)}]"
        yield from _toml_lines(value, name)
    for key, items in arrays.items():
        name = (*path, _toml_key(key))
        for item in items:
            yield f"\n[[{'.'.join(name)}]]"
            yield from _toml_lines(item, name)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    # JSON is TOML here but for one control character, which JSON leaves as it is and TOML forbids.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
