"""The layers of the house: imports go strictly downward, and some libraries have only one way in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "daramgpt"
LAYERS: dict[str, int] = {
    **dict.fromkeys(
        (
            "blocks",
            "errors",
            "malloc",
            "run_directory",
            "recipe",
            "gpu_table",
            "hardware",
            "ds_config",
            "ledger",
            "results_table",
            "text_table",
            "vector_math",
        ),
        0,
    ),
    **dict.fromkeys(
        (
            "attention",
            "bootstrap",
            "budget",
            "compiling",
            "corpora",
            "generate",
            "losses",
            "moments",
            "pace",
            "progress",
            "quickstart",
            "recipe_changes",
            "student",
            "teacher",
            "trackers",
        ),
        1,
    ),
    **dict.fromkeys(("curriculum", "tokenizer", "engine"), 2),
    **dict.fromkeys(("shards", "checkpoint", "planner", "persistence"), 3),
    **dict.fromkeys(
        (
            "train",
            "status",
            "tasks",
            "model_card",
            "export",
            "evaluation",
            "gguf_export",
            "initialisation",
            "report",
            "doctor",
            "launcher",
            "planning",
        ),
        4,
    ),
    **dict.fromkeys(("commands", "cli", "__main__"), 5),
}
# Inside one layer these may be imported by the others of it: they are the layer's own ground floor.
GROUND_FLOOR = {
    "errors",
    "gpu_table",
    "text_table",
    "run_directory",
    "ledger",
    "model_card",
    "status",
    "export",
    "commands",
    "cli",
    "checkpoint",
    "initialisation",
}
ONLY_IMPORTERS = {
    "bitsandbytes": {"teacher", "engine"},
    "deepspeed": {"engine"},
    "rich": {"progress", "cli"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Module of the house that a file belongs to: a package counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, anywhere in it, and whether only type checkers see the import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "daramgpt":
                names = [f"daramgpt.{alias.name}" for alias in node.names]
            for name in names:
                yield name, id(node) in typing_only


def test_every_module_has_a_layer() -> None:
    found = {name_of(path) for path in modules()} - {"__init__"}
    assert found == set(LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    module = name_of(path)
    for name, typing_only in imported(path):
        parts = name.split(".")
        if parts[0] != "daramgpt" or len(parts) < 2 or parts[1] in (module, "__version__") or module == "__init__":
            continue
        target = parts[1]
        assert target in LAYERS, f"{module} imports {name}, which has no layer"
        if typing_only:
            continue
        below = LAYERS[target] < LAYERS[module]
        beside = LAYERS[target] == LAYERS[module] and target in GROUND_FLOOR and module not in GROUND_FLOOR
        beside |= LAYERS[target] == LAYERS[module] and (module, target) in {
            ("recipe", "errors"),
            ("recipe", "run_directory"),
            ("ledger", "errors"),
            ("ledger", "run_directory"),
            ("run_directory", "errors"),
            ("cli", "commands"),
            ("__main__", "cli"),
            ("export", "model_card"),
            ("planning", "train"),
            ("report", "tasks"),
        }
        assert below or beside, f"{module} (layer {LAYERS[module]}) imports {target} (layer {LAYERS[target]})"


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_library_has_its_importers_only(library: str) -> None:
    importers = {name_of(path) for path in modules() for name, _ in imported(path) if name.split(".")[0] == library}
    assert importers <= ONLY_IMPORTERS[library]


def test_the_report_imports_nothing_that_trains() -> None:
    heavy = {"torch", "transformers", "deepspeed", "bitsandbytes"}
    for path in (PACKAGE / "report").rglob("*.py"):
        assert not {name.split(".")[0] for name, _ in imported(path)} & heavy
