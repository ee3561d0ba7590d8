"""The one exception for what a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A fault that the user can mend; the command prints it as one line and exits with code 2.

    Args:
        fault: what is wrong, naming the file or key.
        mend: what to do about it.
    """

    def __init__(self, fault: str, mend: str) -> None:
        self.fault = " ".join(fault.split())
        self.mend = " ".join(mend.split())
        super().__init__(f"{self.fault}; {self.mend}")
