"""Settings that decide the result of a run: which they are, how two recipes differ in them, and what may change.

A run goes on with the settings that it was begun with. Where corpora and models lie is none of them, for they may be
mounted elsewhere in each session: what they are is told by the shards, and by the teacher's own fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from daramgpt.errors import UserError
from daramgpt.recipe import Recipe

# What decides no result, but for the rounding of its arithmetic.
_FREE: Any = {
    **dict.fromkeys(("budget", "checkpoint", "engine", "evaluation", "name", "persistence", "report_to"), True),
    "corpus": {"dir", "workers"},
    "student": {"init_model"},
    "teacher": {"model"},
}
# Sections and keys with whose new values a run can go on where it is asked to: rows and shapes of tensors stay.
CHANGEABLE = ("loss.", "optimizer.", "schedule.", "teacher.half_accumulation", "teacher.precision")
# Of them, what the rows of a step follow from.
UNCHANGEABLE = ("optimizer.batch_tokens",)


@dataclass(frozen=True)
class Change:
    """Of a setting that decides the result of a run."""

    key: str
    old: Any
    new: Any

    @property
    def is_allowed(self) -> bool:
        """Whether a run can go on with the new value, where it is asked to."""
        return self.key.startswith(CHANGEABLE) and self.key not in UNCHANGEABLE

    def __str__(self) -> str:
        return f"{self.key}: {self.old} → {self.new}"


def settings_that_matter(recipe: Recipe) -> dict[str, Any]:
    """Keys that decide the result of a run and their JSON values, as a checkpoint keeps them."""
    return dict(_flatten(recipe.model_dump(mode="json", exclude=_FREE)))


def differences(old: Recipe, new: Recipe) -> list[Change]:
    """In what decides the result of a run."""
    return changes(settings_that_matter(old), settings_that_matter(new))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """As `differences`, of what `settings_that_matter` gave."""
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse(found: list[Change], where: str, allows_changes: bool) -> None:
    """Refuse changes: all, or those that a run cannot go on with.

    Args:
        found: as from `differences` or `changes`.
        where: the fault's beginning, up to the word "settings".
        allows_changes: lets those pass that a run can go on with.

    Raises:
        UserError: names each change that is refused.
    """
    refused = [change for change in found if not (allows_changes and change.is_allowed)]
    if not refused:
        return
    mend = "give the same settings, or another --run"
    if all(change.is_allowed for change in refused):
        mend = "give the same settings, --allow-changes to go on with the new ones, or another --run"
    raise UserError(f"{where} other settings: {'; '.join(map(str, refused))}", mend)


def _flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, data
