"""What launch.sh asks before its environment exists; run by a bare python3, so only the standard library is used.

``key`` names what an environment depends on: launch.sh writes it down after an installation and compares it before
the next, so that a second run installs nothing. ``machine-torch`` decides whether the machine's own torch is used;
``describe`` prints what a run would choose and why.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from daramgpt import hardware

PACKAGE = Path(__file__).parent


def environment_key() -> str:
    """One line: device, torch pin, the machine's own torch where this Python sees it, hash of the requirements.

    A torch inside the environment itself counts as "inside", whatever its version: the user may have put it there.
    """
    machine = hardware.detect()
    try:
        distribution = importlib.metadata.distribution("torch")
        folder = Path(str(distribution.locate_file(""))).resolve()
        torch = "inside" if folder.is_relative_to(Path(sys.prefix).resolve()) else distribution.version
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    requirements = hashlib.sha256((PACKAGE.parent / "pyproject.toml").read_bytes()).hexdigest()[:16]
    return f"{machine.device} {hardware.choose(machine).torch_pin} {torch} {requirements}"


def machine_torch() -> tuple[bool, str]:
    """Whether the torch of this Python serves this machine, and its version and folder, or why it does not."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False, "none is installed"
    # A library that prints while it is imported must not get into the answer.
    with contextlib.redirect_stdout(io.StringIO()):
        fault = hardware.torch_fault(hardware.detect())
    if fault:
        return False, fault
    return True, f"{version} {importlib.metadata.distribution('torch').locate_file('')}"


def describe(recipe: str, overrides: list[str]) -> str:
    """The machine, and dtype, teacher precision and ds_config of a run of `recipe`, each with its reason."""
    machine = hardware.detect()
    choices = hardware.choose(machine)
    settings = _settings(recipe, overrides)
    dtype, ds_config, precision = choices.dtype, choices.ds_config, choices.teacher_precision
    reasons = dict(choices.reasons)
    if settings.get("engine.ds_config", "auto") != "auto":
        ds_config = settings["engine.ds_config"]
        reasons["ds_config"] = f"the recipe or the command line says so; this machine would have {choices.ds_config}"
        dtype = _dtype(ds_config) or dtype
        if dtype != choices.dtype:
            reasons["dtype"] = f"the ds_config says so; this machine would have {choices.dtype}"
    if settings.get("teacher.precision", "auto") != "auto":
        precision = settings["teacher.precision"]
        reasons["teacher_precision"] = (
            f"the recipe or the command line says so; this machine would have {choices.teacher_precision}"
        )
    else:
        candidates = ", ".join(hardware.teacher_candidates(machine, dtype))
        reasons["teacher_precision"] += f"; plan measures {candidates} here and takes {hardware.TEACHER_RULE}"
    rows = [
        ("machine", machine.describe(), ""),
        ("dtype", dtype, reasons["dtype"]),
        ("teacher", precision, reasons["teacher_precision"]),
        ("ds_config", ds_config, reasons["ds_config"]),
    ]
    return "\n".join(f"  {name:<12} {value}" + (f": {reason}" if reason else "") for name, value, reason in rows)


def _settings(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What the recipe and the command line say of precision and ds_config; checked later, by the recipe itself."""
    path = Path(recipe) if recipe.endswith(".toml") else PACKAGE / "recipes" / f"{recipe}.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(known.stem for known in (PACKAGE / "recipes").glob("*.toml")))
        raise SystemExit(f"recipe {recipe}: {error}; use one of {names}, or the path of a .toml file") from None
    settings = {}
    for section, key in (("engine", "ds_config"), ("teacher", "precision")):
        table = data.get(section)
        if isinstance(table, dict) and key in table:
            settings[f"{section}.{key}"] = table[key]
    for override in overrides:
        name, _, value = override.partition("=")
        settings[name.strip()] = value.strip().strip('"')
    return settings


def _dtype(ds_config: str) -> str | None:
    """What the file says of precision; None where it cannot be read (the doctor says why)."""
    path = Path(ds_config) if ds_config.endswith(".json") else PACKAGE / "ds_configs" / f"{ds_config}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return next((dtype for dtype in ("fp16", "bf16") if config.get(dtype, {}).get("enabled") is True), "fp32")
    except (OSError, ValueError, AttributeError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m daramgpt.bootstrap", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("key")
    commands.add_parser("machine-torch")
    describer = commands.add_parser("describe")
    describer.add_argument("recipe")
    describer.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    if arguments.command == "key":
        print(environment_key())
    elif arguments.command == "machine-torch":
        serves, text = machine_torch()
        print(text)
        sys.exit(0 if serves else 1)
    else:
        print(describe(arguments.recipe, arguments.overrides))


if __name__ == "__main__":
    main()
