"""The documents of the repository, and the commands that they name. Read by the standard library alone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "README.ko.md",
    "CONTRIBUTING.md",
    "docs/corpora.md",
    "docs/evaluation.md",
    "docs/how-it-works.md",
    "docs/kaggle.md",
    "docs/recipes.md",
    "docs/sessions.md",
    "docs/several-gpus.md",
    "docs/student.md",
    "docs/teacher.md",
    "docs/troubleshooting.md",
)
PYTHON = ".venv/bin/python"


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def shell_lines(document: str) -> list[str]:
    """Lines of the shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text(document), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def spans(document: str) -> list[str]:
    """Code in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text(document), flags=re.MULTILINE | re.DOTALL))


def commands(document: str) -> list[str]:
    """Those of the blocks, then those in running text."""
    return [*shell_lines(document), *filter(is_command, spans(document))]


def is_command(span: str) -> bool:
    return span.startswith(("bash ", f"{PYTHON} ", "python "))
