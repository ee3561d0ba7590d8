"""What a setting may be: limits, sizes in bytes, paths."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

# No setting is beyond these, and arithmetic with them ends.
MOST, MOST_BYTES, MOST_HOURS, MOST_BATCH_TOKENS = 2**31 - 1, 10**15, 10**6, 2**28
MOST_LETTERS, MOST_PATH_BYTES, MOST_NAME_BYTES = 100, 4095, 255
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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
