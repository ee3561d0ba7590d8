"""The places outside of the machine that a recipe names for copies of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from daramgpt import recipe as recipes
from daramgpt.recipe import Recipe
from daramgpt.recipe_changes import differences, refuse
from daramgpt.run_directory import RunDirectory

if TYPE_CHECKING:
    from daramgpt.persistence import Target
    from daramgpt.progress import Console


def targets(recipe: Recipe) -> list[Target]:
    """Of the recipe, in the order in which they get a copy; none where it names none."""
    settings = recipe.persistence
    if settings.directory is None and settings.hub is None and settings.after_save is None:
        return []
    from daramgpt import persistence

    found: list[Target] = []
    if settings.directory is not None:
        found.append(persistence.DirectoryPlace(Path(settings.directory)))
    if settings.hub is not None:
        found.append(persistence.HubPlace(settings.hub))
    if settings.after_save is not None:
        found.append(persistence.Hook(settings.after_save))
    return found


def fetch(recipe: Recipe, run: RunDirectory, console: Console, allows_changes: bool = False) -> None:
    """Bring what the places of the recipe have beyond this run directory; the caller holds its lock.

    Raises:
        UserError: what is there cannot be had, or is a run with other settings.
    """
    if not (places := targets(recipe)):
        return
    from daramgpt import persistence

    persistence.fetch(places, run, console)
    if run.recipe.is_file():
        changed = differences(recipes.load(str(run.recipe)), recipe)
        refuse(changed, f"{run.recipe}: that run was begun with", allows_changes)
