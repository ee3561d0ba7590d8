"""A page as a browser without a head shows it: what is amiss on it, and its picture.

A window of such a browser is no narrower than 500 pixels, so the page lies in a frame of the width that is asked for.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

from daramgpt.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120
# Pixels around the frame in the window.
MARGIN = 8
# Looks for what sticks out of the window, lies over its neighbour, or is empty, and what the page asked others for.
PROBE = """<script>
const boxes = [...document.querySelectorAll("h1, h2, p, figure, .tile, .scroll, .sample")]
    .map(element => [element, element.getBoundingClientRect()]);
const faults = boxes.filter(([, box]) => box.right > innerWidth + 1 || !box.height).map(([e]) => e.outerHTML);
boxes.forEach(([a, x]) => boxes.forEach(([b, y]) => {
    if (a !== b && !a.contains(b) && !b.contains(a) && x.left < y.right - 1 && y.left < x.right - 1
        && x.top < y.bottom - 1 && y.top < x.bottom - 1) faults.push(a.outerHTML + b.outerHTML);
}));
document.querySelectorAll("svg").forEach(svg => {
    const box = svg.getBBox();
    if (box.width < 100 || box.height < 100) faults.push("empty picture");
});
if (document.documentElement.scrollWidth > innerWidth) faults.push("wider than the window");
document.title = JSON.stringify({faults, requests: performance.getEntriesByType("resource").map(e => e.name),
    height: document.documentElement.scrollHeight, dark: matchMedia("(prefers-color-scheme: dark)").matches});
</script>"""


def browser() -> str | None:
    """The command of a Chromium, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look(page: Path, width: int, dark: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """Open a page in a window of a width, in a browser that has the light or the dark appearance.

    Args:
        page: an HTML file.
        width: of the window, in pixels.
        dark: what the page is told that the reader prefers.
        picture: takes a PNG of the whole page.

    Returns:
        ``faults``, what is amiss; ``requests``, what the page loaded; ``height`` in pixels; ``dark``, what the page
        saw; ``console``, lines that it wrote.

    Raises:
        UserError: there is no browser, or it does not answer.
    """
    command = browser()
    if command is None:
        raise UserError("there is no chromium on this machine", "install it (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory(prefix="daramgpt-browser-") as scratch:
        folder = Path(scratch)
        html = page.read_text(encoding="utf-8")
        (folder / "page.html").write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        options = [command, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        options += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--hide-scrollbars"]
        asked = _run([*options, f"--window-size={width + 100},1000", "--dump-dom", _frame(folder, width, 900)])
        title = re.search(r"<title>(.*?)</title>", asked.stdout, re.DOTALL)
        if title is None:
            raise UserError(f"{command} gives no answer: {asked.stderr[-500:]}", "try it by hand")
        found: dict[str, Any] = json.loads(unescape(title[1]))
        found["console"] = [line for line in asked.stderr.splitlines() if "CONSOLE" in line]
        if picture is not None:
            height = found["height"] + 2 * MARGIN
            size = f"--window-size={max(500, width + 2 * MARGIN)},{height + MARGIN}"
            _run([*options, size, f"--screenshot={picture.resolve()}", _frame(folder, width, height)])
        return found


def _frame(folder: Path, width: int, height: int) -> str:
    path = folder / "frame.html"
    path.write_text(
        f'<body style="margin: {MARGIN}px"><iframe src="page.html" width="{width}" height="{height}" style="border: 0">'
        "</iframe><script>onload = () => document.title = frames[0].document.title</script></body>"
    )
    return path.as_uri()


def _run(line: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{line[0]} does not answer within {SECONDS} s", "try it by hand") from None
