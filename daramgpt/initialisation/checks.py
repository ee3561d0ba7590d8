"""Whether a student can begin as its recipe says: by configurations alone, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daramgpt import teacher
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe, Shape, Student
from daramgpt.shards.encode import tokenizer_sha256

_MEND = 'set student.init = "random"'
_TOKENIZER = "tokenizer.json"


def check_recipe(recipe: Recipe) -> str:
    """See that the student can begin as it is to, by what is known before the run.

    Returns:
        What it begins with, for people.

    Raises:
        UserError: it cannot, or a configuration cannot be read.
    """
    student = recipe.student
    if student.init == "random":
        return "random weights"
    assert recipe.teacher is not None
    context = recipe.curriculum.context_tokens
    if recipe.teacher.train is not None:
        teacher_dir, config = None, _config_of(recipe.teacher.train)
    else:
        assert recipe.teacher.model is not None
        teacher_dir = teacher.resolve(recipe.teacher.model, recipe.teacher.revision, only_config=True)
        config = read_config(teacher_dir, "teacher.model")
        context = min(context, int(getattr(config, "max_position_embeddings", context)))
    if student.init != "layers":
        student, fault = settled(student, config)
        if fault:
            return f"random weights ({fault})"
        check(config, student)
        return f"weights {student.init} from the teacher"
    model_dir = find(student, only_config=True)
    vocab_size = None if teacher_dir is None else int(config.vocab_size)
    check_layers(read_config(model_dir, "student.init_model"), student, vocab_size, context)
    if teacher_dir is not None and all((folder / _TOKENIZER).is_file() for folder in (teacher_dir, model_dir)):
        check_tokenizer(model_dir, teacher_dir)
    return f"{student.n_layer} blocks of {student.init_model}"


def find(student: Student, only_config: bool = False) -> Path:
    """Directory of ``student.init_model``, fetched where it is a hub id.

    Raises:
        UserError: there is none.
    """
    assert student.init_model is not None
    try:
        return teacher.resolve(student.init_model, only_config=only_config)
    except UserError as error:
        raise of_init_model(error) from None


def of_init_model(error: UserError) -> UserError:
    """What `daramgpt.teacher` says of a model, by the key that this one has."""
    return UserError(error.fault.replace("teacher.model", "student.init_model"), error.mend)


def read_config(model_dir: Path, key: str) -> Any:
    """The configuration of a model, as transformers reads it.

    Args:
        model_dir: a Hugging Face directory.
        key: of the recipe, that names it.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {model_dir}/config.json: {error}", "give a causal language model") from None


def settled(student: Student, config: Any) -> tuple[Student, str]:
    """With what ``"auto"`` stands for, where that is its ``init``: projected from the teacher where that can be.

    Args:
        student: as the recipe has it.
        config: the teacher's.

    Returns:
        The student, and why it is to begin with random weights instead; empty where it is not.
    """
    if student.init != "auto":
        return student, ""
    projected = student.model_copy(update={"init": "projected"})
    try:
        check(config, projected)
    except UserError as error:
        return student.model_copy(update={"init": "random"}), error.fault
    return projected, ""


def check(config: Any, student: Student) -> None:
    """See that a student of this shape can be projected or pruned from a teacher.

    Args:
        config: the teacher's.
        student: as the recipe has it.

    Raises:
        UserError: the teacher is no GPT-2, or smaller than the student.
    """
    name = f'student.init = "{student.init}"'
    _check_architecture(config, f"{name} needs a GPT-2 as teacher")
    is_larger = student.n_embd > config.n_embd or student.n_layer > config.n_layer
    if student.init == "pruned":
        is_larger |= student.n_head > config.n_head
    if is_larger:
        raise UserError(
            f"{name}: the student ({_shape(student)}) is larger than the teacher ({_shape(config)})",
            _MEND,
        )


def check_layers(config: Any, student: Student, vocab_size: int | None, positions: int) -> None:
    """See that blocks of a model fit a student.

    Args:
        config: that of ``student.init_model``.
        student: as the recipe has it.
        vocab_size: of the student; None where it is not known yet.
        positions: of the student.

    Raises:
        UserError: the model is no GPT-2, of another width or with other heads, or has fewer blocks, positions or other
            tokens than the student.
    """
    name = f"student.init_model: {student.init_model}"
    _check_architecture(config, f"{name}: a GPT-2 is needed")
    neurons = config.n_inner or 4 * config.n_embd
    for key, found, wanted in (
        ("n_embd", config.n_embd, student.n_embd),
        ("n_head", config.n_head, student.n_head),
        ("n_inner", neurons, 4 * student.n_embd),
        ("vocab_size", config.vocab_size, config.vocab_size if vocab_size is None else vocab_size),
    ):
        if found != wanted:
            mend = "give another model" if key in ("n_inner", "vocab_size") else f"set student.{key} = {found}"
            raise UserError(f"{name} has {key} {found}, the student {wanted}", f"{mend}, or {_MEND}")
    for key, found, least in (
        ("n_layer", config.n_layer, student.n_layer),
        ("n_positions", config.n_positions, positions),
    ):
        if found < least:
            mend = f"student.n_layer = {found}" if key == "n_layer" else f"curriculum.context_tokens = {found}"
            raise UserError(f"{name} has {key} {found}, the student {least}", f"set {mend}, or {_MEND}")


def check_tokenizer(model_dir: Path, tokenizer_dir: Path) -> None:
    """See that a model numbers its tokens as the run does.

    Args:
        model_dir: of ``student.init_model``.
        tokenizer_dir: of the run.

    Raises:
        UserError: it does not, or has no ``tokenizer.json`` to see that by.
    """
    from tokenizers import Tokenizer

    mend = "give a model with the teacher's tokenizer"
    path = model_dir / _TOKENIZER
    if not path.is_file():
        raise UserError(f"student.init_model: {model_dir} holds no {_TOKENIZER}", f"{mend}, and its {_TOKENIZER}")
    if tokenizer_sha256(model_dir) == tokenizer_sha256(tokenizer_dir):
        return
    # The same tokens may be written down in another way.
    try:
        own, wanted = (Tokenizer.from_file(str(folder / _TOKENIZER)) for folder in (model_dir, tokenizer_dir))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"student.init_model: {path} cannot be read: {error}", mend) from None
    if own.get_vocab() != wanted.get_vocab():
        raise UserError(f"student.init_model: {path} is another tokenizer than the teacher's", mend)


def _check_architecture(config: Any, fault: str) -> None:
    if getattr(config, "model_type", None) != "gpt2" or "gelu" not in str(config.activation_function):
        raise UserError(f"{fault}, with GELU", _MEND)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        raise UserError(f"{fault}, with the usual scale of attention", _MEND)


def _shape(config: Any) -> str:
    return f"{config.n_embd}/{config.n_head}/{config.n_layer}"


def _config_of(shape: Shape) -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=shape.n_embd, n_head=shape.n_head, n_layer=shape.n_layer)
