"""Whether the packages that a P100 gets install together and pass the tests, on any machine with a package index.

    python -m benchmarks.p100_set [--folder DIR] [--json FILE] [PYTEST ARGUMENTS ...]

``launch.sh`` installs them itself, into a fresh clone of the last commit: a stand-in for nvidia-smi says that there is
a P100, so it pins the last torch with kernels for one. The tests then run without the stand-in, on the CPU; what a P100
computes they cannot tell. Takes some 7 GB of disk, most of it CUDA libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import machine

ROOT = Path(__file__).parents[1]
NVIDIA_SMI = "#!/bin/sh\necho 'Tesla P100-PCIE-16GB, 16280 MiB, 6.0'\n"
# What the tests run with on a machine without a GPU, as launch.sh sets it there.
TEST_ENVIRONMENT = {**machine.SIDE_ENVIRONMENT, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
DESCRIBE = """
import importlib.metadata, json, platform, torch
packages = ("torch", "transformers", "deepspeed", "bitsandbytes", "datasets", "accelerate", "numpy")
versions = {name: importlib.metadata.version(name) for name in packages}
flags = torch._C._cuda_getArchFlags() or ""
print(json.dumps({"versions": {"python": platform.python_version(), **versions, "cuda": torch.version.cuda},
                  "kernels": flags.split()}))
"""


def install(folder: Path) -> float:
    """Clone the last commit into `folder`/checkout and let its launch.sh install for a P100; seconds it took."""
    checkout, programs = folder / "checkout", folder / "bin"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    # Samples that tests read where they are at hand.
    samples = ROOT.parent / "shared"
    if samples.is_dir():
        (folder / "shared").symlink_to(samples)
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text(NVIDIA_SMI, encoding="utf-8")
    smi.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    start = time.monotonic()
    subprocess.run(["bash", "launch.sh", "test", "--version"], cwd=checkout, env=environment, check=True)
    return time.monotonic() - start


def run_tests(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Outcome of pytest in that environment: counts, seconds, and the names of what failed."""
    record = folder / "tests.xml"
    start = time.monotonic()
    subprocess.run(
        [".venv/bin/python", "-m", "pytest", "-q", f"--junitxml={record}", *arguments],
        cwd=folder / "checkout",
        env={**os.environ, **TEST_ENVIRONMENT},
        check=False,
    )
    return {"seconds": time.monotonic() - start, **read_outcome(record)}


def read_outcome(record: Path) -> dict[str, Any]:
    """Counts of a JUnit record; a test that failed, or whose fixture did, is named."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.parse(record).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return {**counts, "failures": failures}


def measure(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Install and test in `folder`, which is empty."""
    seconds = install(folder)
    checkout = folder / "checkout"
    described = subprocess.run(
        [".venv/bin/python", "-c", DESCRIBE], cwd=checkout, check=True, capture_output=True, text=True
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        **json.loads(described.stdout),
        "install_seconds": seconds,
        "pytest_arguments": arguments,
        "tests": run_tests(folder, arguments),
    }


def format_result(result: dict[str, Any]) -> str:
    """Versions, and how many tests passed, failed and were skipped."""
    rows = [[name, version] for name, version in result["versions"].items()]
    rows.append(["kernels", " ".join(result["kernels"])])
    rows.append(["installation", f"{result['install_seconds']:.0f} s"])
    tests = result["tests"]
    rows += [[name, f"{tests[name]}"] for name in ("passed", "failed", "skipped")]
    return "\n".join([machine.format_table(["P100 set", result["date"]], rows), *tests["failures"]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.p100_set", description=__doc__)
    parser.add_argument("--folder", type=Path, help="empty or new; kept (default: a temporary one, removed)")
    parser.add_argument("--json", type=Path, help="file for the result")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, arguments)
    machine.write_result(result, options.json)
    print(format_result(result))


if __name__ == "__main__":
    main()
