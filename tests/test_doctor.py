"""The doctor names what would stop a run, and what mends it."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from daramgpt import doctor, hardware, recipe
from daramgpt.hardware import GIB, Gpu, Machine
from daramgpt.run_directory import RunDirectory

CPU = Machine((), 2, 8 * GIB)
T4 = Machine((Gpu("Tesla T4", 15360 * 2**20, (7, 5)),), 2, 8 * GIB)
P100 = Machine((Gpu("Tesla P100-PCIE-16GB", 16280 * 2**20, (6, 0)),), 2, 8 * GIB)


def blocked(run: Path, machine: Machine, source: str, *overrides: str) -> dict[str, str]:
    checks = doctor.check(recipe.load(source, list(overrides)), RunDirectory(run), machine)
    return {check.name: check.text for check in checks if check.blocks}


def test_the_quickstart_is_healthy_here(tmp_path: Path) -> None:
    checks = doctor.check(recipe.load("quickstart"), RunDirectory(tmp_path / "run"), CPU)
    assert [check.line() for check in checks if check.blocks] == []
    assert {"torch", "kernel", "8 bits", "ds_config", "teacher", "corpus", "disk"} <= {check.name for check in checks}
    assert not (tmp_path / "run").exists()


def test_what_the_recipe_names_and_is_not_there_is_blocked(tmp_path: Path) -> None:
    faults = blocked(
        tmp_path, CPU, "daramgpt", "corpus.dir=/nowhere", "teacher.model=./missing", "engine.ds_config=cpuu"
    )
    assert faults.keys() == {"corpus", "teacher", "ds_config"}
    assert "/nowhere" in faults["corpus"]
    assert "./missing" in faults["teacher"]
    assert "cpuu" in faults["ds_config"] and "use one of" in faults["ds_config"]


def test_no_corpus_at_all_is_blocked(tmp_path: Path) -> None:
    assert "--corpus" in blocked(tmp_path, CPU, "daramgpt")["corpus"]


def test_a_precision_the_gpu_lacks_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda machine: doctor.Check("torch", "blocked", "not asked here"))
    assert "8.0" in blocked(tmp_path, T4, "quickstart", "engine.ds_config=h100-80gb")["ds_config"]
    assert "7.5" in blocked(tmp_path, P100, "quickstart", "teacher.precision=llm-int8")["teacher"]


def test_a_torch_without_the_p100s_kernels_is_mended_by_the_release_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "torch_fault", lambda machine: "torch 2.13.0 has no sm_60 kernels")
    text = blocked(tmp_path, P100, "quickstart")["torch"]
    assert "no sm_60 kernels" in text
    assert "-m pip install torch==2.7.1" in text


def test_too_little_disk_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(GIB, GIB, 0))
    assert "--run" in blocked(tmp_path, CPU, "quickstart")["disk"]
