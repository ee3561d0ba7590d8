"""What copies are given to, and where they can be read from again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from daramgpt.persistence.contents import Contents


class PlaceError(OSError):
    """A place could not be read or written now; it may be there again later."""


class Target(ABC):
    """What is given each checkpoint.

    Attributes:
        name: for lines.
    """

    name: str

    @abstractmethod
    def copy(self, contents: Contents, keep: int) -> None:
        """Take a copy.

        Args:
            contents: of the run.
            keep: newest checkpoints of each training that stay.

        Raises:
            OSError: it was not taken; what was taken before is still whole.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing that would outlive the session
        """Give up what is being taken: the session is over."""


class Place(Target):
    """What copies can be read from again."""

    @abstractmethod
    def files(self, run: str) -> set[str]:
        """Names of all files that it holds of a run, relative to the run; none where it holds none.

        Raises:
            OSError: it cannot be reached.
        """

    @abstractmethod
    def bring(self, run: str, names: Iterable[str], into: Path) -> Path:
        """Copy files to this machine.

        Args:
            run: name of the run.
            names: some of those that `files` gave.
            into: a folder that is not there yet.

        Returns:
            The folder that they now stand in, by their names: `into` or one in it.

        Raises:
            OSError: it cannot be reached, a file is gone, or this disk is full.
        """
