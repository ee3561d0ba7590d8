"""One thing the doctor looked at, and the words of its mends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "blocked"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; `text` says what was found and, where it is not ok, what mends it."""

    name: str
    status: Status
    text: str

    @property
    def blocks(self) -> bool:
        return self.status == "blocked"

    def line(self) -> str:
        """As the doctor prints it."""
        return f"{self.status:<8} {self.name:<11} {self.text}"


def pip_install(*arguments: str) -> str:
    """The command that installs into the Python that runs the doctor."""
    quoted = " ".join(f'"{argument}"' if ">" in argument else argument for argument in arguments)
    return f"{sys.executable} -m pip install {quoted}"
