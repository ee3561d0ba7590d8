"""Recipes read from TOML, with ``--set a.b=c`` over them, and written back."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from daramgpt.errors import UserError
from daramgpt.recipe.recipe import Recipe
from daramgpt.run_directory import read_text

RECIPES_DIR = Path(__file__).parents[1] / "recipes"


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
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
