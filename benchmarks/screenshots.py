"""Pictures of a report in a browser: on a desk and on a telephone, light and dark, and what is amiss on each.

    python -m benchmarks.screenshots --report FILE [--out DIR] [--json FILE]

Needs Chromium. Writes ``report-<width>-<light|dark>.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import command, machine
from benchmarks.browser import look
from daramgpt.errors import UserError

WIDTHS = (1400, 420)


def measure(report: Path, out: Path) -> dict[str, Any]:
    """The result without hardware and versions.

    Raises:
        UserError: there is no report, or no browser.
    """
    if not report.is_file():
        raise UserError(f"{report} is no file", "give the report.html of a run")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for width in WIDTHS:
        for name in ("light", "dark"):
            picture = out / f"report-{width}-{name}.png"
            found = look(report, width, dark=name == "dark", picture=picture)
            if found["dark"] != (name == "dark"):
                raise UserError(f"the browser does not show the {name} appearance", "take a newer Chromium")
            keys = ("faults", "requests", "console", "height")
            rows.append({"width": width, "appearance": name, **{key: found[key] for key in keys}})
    return {"rows": rows}


def format_result(result: dict[str, Any]) -> str:
    """The table, and whatever is amiss in full."""
    counted = ("faults", "requests", "console")
    table = machine.format_table(
        ("", "height", *counted),
        [
            (
                f"{row['width']} {row['appearance']}",
                f"{row['height']:,}",
                *(str(len(row[key])) for key in counted),
            )
            for row in result["rows"]
        ],
    )
    return "\n".join((table, *(f"{key}: {one}" for row in result["rows"] for key in counted for one in row[key])))


def main() -> int:
    """Look, print, write."""
    parser = command.parser("screenshots", __doc__)
    parser.add_argument("--report", type=Path, required=True, help="report.html of a run")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    return command.run(lambda: measure(arguments.report, arguments.out), format_result, arguments.json, "screenshots")


if __name__ == "__main__":
    sys.exit(main())
