"""docs/kaggle.ipynb is a notebook, has no outputs, and its cells build commands that launch.sh and daramgpt take.

`.ci/run` executes it from top to bottom.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_docs import check_daramgpt, check_launch

ROOT = Path(__file__).parents[1]
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "docs" / "kaggle.ipynb").read_text(encoding="utf-8"))
SHELL = re.compile(r"^!(.*)$", re.MULTILINE)


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(cells: list[str], names: dict[str, Any]) -> None:
    """What Python would run of cells, their commands left out."""
    for source in cells:
        exec(compile(SHELL.sub("_exit_code = 0", source), "notebook", "exec"), names)


def test_it_is_a_notebook_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for source in code_cells():
        ast.parse(SHELL.sub("pass", source))


def test_every_setting_is_named_on_its_page_or_explained_beside_it() -> None:
    settings = code_cells()[0].splitlines()
    assert all(re.fullmatch(r'[A-Z]+ = ("\w*"|[\d.]+|\[\])  # .+', line) for line in settings), settings


@pytest.mark.parametrize("changes", [{}, {"CORPUS": "corpora", "RECIPE": "daramgpt", "COPIES": "me/copies"}])
def test_its_session_is_a_command_that_launch_takes(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("HF_TOKEN", "none")
    settings, code, session, status = code_cells()[:4]
    names: dict[str, Any] = {}
    run([settings], names)
    names |= changes
    run([code, session, status], names)
    words = shlex.split(names["session"])
    assert words[:2] == ["bash", str(ROOT / "launch.sh")]
    check_launch(tuple(words[2:]))
    for source in (status, code_cells()[5]):
        [line] = SHELL.findall(source)
        words = shlex.split(line.format(**{name: names[name] for name in ("daramgpt", "options")}))
        assert words[1:3] == ["-m", "daramgpt"]
        check_daramgpt(words[3:])


def test_a_folder_without_the_code_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict[str, Any] = {}
    with pytest.raises(AssertionError, match=r"holds no launch\.sh; say in CODE"):
        run(code_cells()[:2], names)
