"""What comes of a command, as an exit code.

0 = done, or stopped on its own deadline with everything saved; 2 = the user can mend it (one line says how);
1 = a fault of the program.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

# As shells say that Ctrl-C ended a command.
INTERRUPTED = 128 + signal.SIGINT

_folder_in_use: Path | None = None


def note_folder(folder: Path) -> None:
    """What the command writes into: a failed write of data, unlike a failed opening, does not say which file it was."""
    global _folder_in_use
    _folder_in_use = folder


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of a command; what the user can mend is said in one line on standard error."""
    from typer.exceptions import TyperException

    from daramgpt.errors import UserError
    from daramgpt.launcher import RankError

    try:
        result = run()
        # typer turns Ctrl-C into this result.
        if result == INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _refuse(str(error))
    except TyperException as error:
        # Usage errors: typer's own line names the option.
        return _refuse(f"{error.format_message()}; see python -m daramgpt --help")
    except (KeyboardInterrupt, typer.Abort):
        _refuse("interrupted; what was saved before stays, the same command goes on from there")
        return INTERRUPTED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
            where = error.filename or _folder_in_use or "a file"
            return _refuse(
                f"{where} could not be written: {error.strerror}; "
                "make room there, or give another --run, and run the same command again"
            )
        raise
    except RankError as error:
        print(error, file=sys.stderr)
        return 1


def leave_at_once(code: int) -> NoReturn:
    """End this process without what the interpreter does as it ends; what was printed and logged stays."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _refuse(line: str) -> int:
    from daramgpt.launcher import REFUSAL

    print(f"{REFUSAL}{' '.join(line.split())}", file=sys.stderr)
    return 2
