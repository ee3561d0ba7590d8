"""The doctor names what would stop a run, and what mends it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from daramgpt import doctor, engine, planner, recipe
from daramgpt.doctor import libraries, needs, precisions
from daramgpt.doctor.finding import Check
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
    assert {"torch", "kernel", "precisions", "deepspeed", "versions", "ds_config", "teacher", "corpus", "disk"} <= {
        check.name for check in checks
    }
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
    monkeypatch.setattr(libraries, "torch", lambda machine: Check("torch", "blocked", "not asked here"))
    assert "8.0" in blocked(tmp_path, T4, "quickstart", "engine.ds_config=h100-80gb")["ds_config"]
    assert "7.5" in blocked(tmp_path, P100, "quickstart", "teacher.precision=llm-int8")["teacher"]


def test_a_torch_without_the_p100s_kernels_is_mended_by_the_release_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    text = blocked(tmp_path, P100, "quickstart")["torch"]
    assert text == (
        "torch 2.13.0+cu130 has no sm_60 kernels for the Tesla P100-PCIE-16GB (it has sm_75 sm_80 sm_90); "
        f"{sys.executable} -m pip install torch==2.7.1"
    )


def test_a_torch_without_cuda_is_replaced_though_its_version_is_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    check = libraries.torch(T4)
    assert check.blocks and "built without CUDA" in check.text
    assert check.text.endswith("-m pip install --force-reinstall torch==2.13.0")


def test_a_package_that_is_too_old_is_not_named_among_those_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    version = libraries.importlib.metadata.version
    monkeypatch.setattr(
        libraries.importlib.metadata, "version", lambda name: "14.3.0" if name == "rich" else version(name)
    )
    old, rest = libraries.packages()
    assert old.blocks and re.match(
        r"rich 14\.3\.0 is older than [0-9.]+; .* -m pip install \"rich>=[0-9.]+\"$", old.text
    )
    assert rest.status == "ok" and "transformers" in rest.text and "rich" not in rest.text


def found(machine: Machine, *alternatives: str) -> list[Check]:
    return list(precisions.precisions(machine, "fp32", alternatives))


def test_every_precision_is_tried() -> None:
    [check] = found(CPU, "int8", "fp32")
    assert check.status == "ok"
    errors = {part.split()[0]: float(part.split()[1]) for part in check.text.split(": ")[1].split(", ")}
    assert errors.keys() == {"fp32", "fp16", "bf16", "int8", "llm-int8", "nf4"}
    assert errors["fp32"] < errors["fp16"] < errors["bf16"] < errors["int8"] < errors["nf4"] < 0.15


def test_a_precision_that_fails_blocks_only_a_run_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from daramgpt.teacher import choice

    def broken(*_: object) -> None:
        raise RuntimeError("no binary for CUDA 99\nmore")

    monkeypatch.setattr(choice, "eight_bit_linear", broken)
    for needed, status in ((("int8", "fp32"), "warn"), (("bf16",), "warn"), (("int8",), "blocked")):
        *faults, rest = found(CPU, *needed)
        assert [(check.status, check.text.split()[3]) for check in faults] == [(status, "int8"), ("warn", "llm-int8")]
        assert "fails: no binary for CUDA 99; " in faults[0].text
        assert f"{sys.executable} -m pip install --force-reinstall --no-deps bitsandbytes==0.50.2" in faults[0].text
        assert ("--set teacher.precision=fp32" in faults[0].text) is (status == "blocked")
        assert rest.status == "ok" and "int8" not in rest.text


def test_a_precision_that_is_wrong_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(precisions.LARGEST_ERROR, "nf4", 0.01)
    fault, _ = found(CPU, "nf4")
    assert fault.blocks and "a layer in nf4 is off from fp32 by" in fault.text


def test_llm_int8_is_not_tried_where_the_gpu_has_no_integer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "_layer_error", lambda name, dtype, device: 0.0)
    [check] = found(P100, "int8", "fp16", "fp32")
    assert "llm-int8 0" not in check.text and "llm-int8 not tried, it needs compute capability 7.5" in check.text


def test_a_run_needs_what_its_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    auto = recipe.load("quickstart", ["teacher.precision=auto"])
    assert needs.alternatives(auto, run, CPU) == ("int8", "fp32")
    assert needs.alternatives(recipe.load("quickstart"), run, CPU) == ("int8",)
    run.plan.write_text("{")
    assert needs.alternatives(auto, run, CPU) == ("int8", "fp32")
    monkeypatch.setattr(planner, "read_plan", lambda run: {"teacher_precision": "fp32"})
    assert needs.alternatives(auto, run, CPU) == ("fp32",)


def test_a_deepspeed_that_does_not_import_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(log: Path) -> None:
        raise OSError("CUDA_HOME does not exist")

    assert libraries.deepspeed(CPU).text.startswith("0.")
    monkeypatch.setattr(engine, "import_deepspeed", broken)
    check = libraries.deepspeed(CPU)
    assert check.blocks and "CUDA_HOME does not exist" in check.text and "deepspeed==0.19.8" in check.text


def test_a_missing_launcher_stops_only_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    several = Machine(T4.gpus * 2, 2, 8 * GIB)
    assert (libraries.deepspeed(T4).status, libraries.deepspeed(several).status) == ("warn", "blocked")
    assert str(tmp_path / "deepspeed") in libraries.deepspeed(T4).text


def test_versions_that_were_not_tried_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: versions[-1] for name, versions in libraries.KNOWN_VERSIONS.items()}
    monkeypatch.setattr(libraries.importlib.metadata, "version", lambda name: known[name])
    assert "known to work together" in libraries.versions().text
    known["transformers"] = "6.1.0"
    text = libraries.versions().text
    assert text.startswith("transformers 6.1.0: not tried") and text.endswith("-m pip install transformers==5.23.0")


def test_the_small_layers_need_neither_transformers_nor_the_compiler() -> None:
    program = (
        "import sys; from daramgpt.doctor import precisions; from daramgpt.hardware import detect;"
        "assert [c.status for c in precisions.precisions(detect(), 'fp32', ())][-1] == 'ok';"
        "print({'transformers', 'torch._dynamo', 'torch._inductor.compile_fx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_too_little_disk_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda folder: usage(GIB, GIB, 0))
    assert "--run" in blocked(tmp_path, CPU, "quickstart")["disk"]
