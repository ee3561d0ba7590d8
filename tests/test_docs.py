"""What README.md, README.ko.md and CONTRIBUTING.md name exists: commands, options, recipe keys, paths, modules."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
import test_house
import typer.main
from documents import DOCUMENTS, PYTHON, ROOT, commands, shell_lines, spans, text

from daramgpt import ds_config
from daramgpt import recipe as recipes
from daramgpt.cli import app
from daramgpt.run_directory import RunDirectory

LAUNCH = (ROOT / "launch.sh").read_text(encoding="utf-8")
IGNORED = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()}
LINTERS = {"pytest", "ruff", "mypy"}
# Words that stand for what a reader has, and what stands for them when a command is tried.
PLACEHOLDERS = {
    "DIR": "corpora",
    "FOLDER": "teacher",
    "WHEELS": str(ROOT),
    "FILE.toml": str(recipes.RECIPES_DIR / "daramgpt.toml"),
}
# Where a notebook's machine has its files.
ELSEWHERE = ("/kaggle/", "/content/")
PATH = re.compile(r"\S*/\S*|[\w.-]+\.(?:py|md|json|jsonl|toml|sh|html|txt)")
OPTION = re.compile(r"--[a-z][a-z-]*")
KEY = re.compile(r"([a-z_]+)\.([a-z_]+)")


def every(find: Any) -> list[Any]:
    """What `find` gets out of each document, once."""
    found = dict.fromkeys((document, item) for document in DOCUMENTS for item in find(document))
    return [pytest.param(*pair, id=": ".join(pair)) for pair in found]


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


@cache
def options() -> set[str]:
    """Every option that a document may name by itself."""
    found = set(re.findall(r"^#.*?(--[a-z-]+)", LAUNCH, re.MULTILINE)) | {"--help"}
    for command in root_command().commands.values():
        found |= {name for parameter in command.params for name in parameter.opts}
    for module in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'add_argument\("(--[a-z-]+)"', module.read_text(encoding="utf-8")))
    return found


def check_settings(recipe: str, words: list[str]) -> None:
    """The recipe exists, and what ``--set`` and ``--ds-config`` give it."""
    values = list(pairwise(words))
    recipes.load(recipe, [value for option, value in values if option == "--set"])
    for option, value in values:
        if option == "--ds-config":
            ds_config.load(value)


@cache
def check_launch(words: tuple[str, ...]) -> None:
    """``launch.sh`` takes these arguments; nothing is installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        # Without site-packages (-S), so that no torch is found and imported.
        python3 = Path(folder) / "python3"
        python3.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n', encoding="utf-8")
        python3.chmod(0o755)
        line = ["bash", "launch.sh", "--dry-run", *(word for word in words if word != "--dry-run")]
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if "test" in words:
        check_paths(list(words[words.index("test") + 1 :]))
    else:
        is_named = bool(words) and not words[0].startswith("--")
        check_settings(words[0] if is_named else "quickstart", list(words))


def check_daramgpt(words: list[str]) -> None:
    """The command line takes these arguments; nothing is run."""
    if words == ["--help"]:
        return
    command = root_command().commands[words[0]]
    context = command.make_context(words[0], words[1:])
    check_settings(context.params["recipe"], words)


def check_paths(words: list[str]) -> None:
    for word in words:
        assert not PATH.fullmatch(word) or (ROOT / word).exists(), word


def check_command(line: str) -> None:
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)]
    match words:
        case ["bash", "launch.sh", *rest]:
            check_launch(tuple(rest))
        case [interpreter, "-m", "daramgpt", *rest] if interpreter == PYTHON:
            check_daramgpt(rest)
        case [interpreter, "-m", module, *rest] if interpreter == PYTHON and module.startswith("benchmarks."):
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            for option in filter(OPTION.fullmatch, rest):
                assert f'"{option}"' in source, option
        case [interpreter, "-m", "pip", "install", *names] if interpreter == PYTHON:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            wanted = [one for extra in project["optional-dependencies"].values() for one in extra]
            assert names and set(names) <= {re.split("[<>=]", one)[0] for one in wanted}
        case [interpreter, "-m", "pip", verb, *_] if interpreter == PYTHON:
            assert verb in {"freeze", "wheel"}
        case [interpreter, "-m", module, *rest] if interpreter == PYTHON and module in LINTERS:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert any(one.startswith(f"{module}>=") for one in extras["optional-dependencies"]["dev"]), module
            check_paths(rest)
        case ["mkdir", "-p", folder]:
            assert folder.startswith(ELSEWHERE)
        case _:
            pytest.fail(f"no command that a reader of this repository has: {line}")


def run_files() -> set[str]:
    """What a run directory holds, by its own description of itself."""
    run = RunDirectory(ROOT)
    names = [name for name, value in vars(RunDirectory).items() if isinstance(value, property)]
    held = [getattr(run, name) for name in names] + [run.part("teacher"), run.part("baseline")]
    return {str(getattr(path, "path", path).relative_to(ROOT)) for path in held}


def exists(path: str) -> bool:
    """In the repository, or made there by a run; of a path with a ``<part>`` to fill in, the folder at its top."""
    if path.startswith(ELSEWHERE):
        return True
    plain = path.rstrip("/")
    top = plain.split("/")[0]
    if plain == recipes.load("daramgpt").teacher.model or plain in run_files() or top in IGNORED:  # type: ignore[union-attr]
        return True
    return (ROOT / top).is_dir() if "<" in plain else (ROOT / plain).exists()


@pytest.mark.parametrize(("document", "line"), every(commands))
def test_commands_are_taken(document: str, line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(("document", "span"), every(lambda d: [s for s in spans(d) if s.startswith("--")]))
def test_options_exist(document: str, span: str) -> None:
    words = shlex.split(span)
    assert words[0] in options()
    if words[0] == "--set":
        check_settings("daramgpt", [PLACEHOLDERS.get(word, word) for word in words])


@pytest.mark.parametrize(("document", "path"), every(lambda d: filter(PATH.fullmatch, spans(d))))
def test_paths_exist(document: str, path: str) -> None:
    assert exists(path)


@pytest.mark.parametrize(("document", "link"), every(lambda d: re.findall(r"\]\(([^)#]+)[^)]*\)", text(d))))
def test_links_lead_somewhere(document: str, link: str) -> None:
    assert link.startswith("https://") or ((ROOT / document).parent / link).exists()


def headings(path: Path) -> set[str]:
    """Of a page, as its links name them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


@pytest.mark.parametrize(("document", "link"), every(lambda d: re.findall(r"\]\(((?!https:)[^)#]*#[^)]+)\)", text(d))))
def test_links_lead_to_headings(document: str, link: str) -> None:
    page, heading = link.split("#")
    assert heading in headings((ROOT / document).parent / page if page else ROOT / document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipe_keys_exist(document: str) -> None:
    for span in filter(lambda span: not PATH.fullmatch(span), spans(document)):
        key = KEY.fullmatch(span)
        if key and key[1] in recipes.Recipe.model_fields:
            annotation = recipes.Recipe.model_fields[key[1]].annotation
            sections: list[Any] = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
            assert all(key[2] in section.model_fields for section in sections), span


def test_both_readmes_show_the_same() -> None:
    assert shell_lines("README.md") == shell_lines("README.ko.md")
    assert sorted(spans("README.md")) == sorted(spans("README.ko.md"))
    printed = [re.findall(r"^```text\n.*?^```", text(name), re.MULTILINE | re.DOTALL) for name in DOCUMENTS[:2]]
    assert printed[0]
    assert printed[0] == printed[1]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    sources = [*(ROOT / "daramgpt").rglob("*.py"), ROOT / "launch.sh"]
    said = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    messages = re.findall(r"^\| `([^`]+)` \|", text("docs/troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        assert all(part.strip() in said for part in message.split("…")), message


def test_the_readme_names_every_command() -> None:
    for command, described in root_command().commands.items():
        assert described.hidden or re.search(rf"\b{command}\b", text("README.md")), command


def test_contributing_shows_the_layers_of_the_house() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", text("CONTRIBUTING.md"), re.MULTILINE)
    assert {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)} == test_house.LAYERS


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## (\S+?),? ", text("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert f'version = "{newest[1]}"' in text("pyproject.toml")
