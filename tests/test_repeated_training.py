"""Two trainings by one plan on one machine end with the same weights, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny_training
from safetensors.torch import load_file

from daramgpt.checkpoint import newest
from daramgpt.engine import without_rank
from daramgpt.run_directory import RunDirectory

CONFIGS = ("cpu", "cpu-bf16")


def test_two_processes_of_two_threads_train_the_same_weights(tmp_path: Path) -> None:
    tiny_training.make_texts(tmp_path / "texts")
    environment = {
        **without_rank(os.environ),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    folders = [tmp_path / name for name in ("first", "second")]
    processes = []
    for folder in folders:
        line = [sys.executable, "-W", "ignore", tiny_training.__file__, str(tmp_path / "texts"), str(folder), *CONFIGS]
        with (tmp_path / f"{folder.name}.txt").open("w") as output:
            processes.append(subprocess.Popen(line, stdout=output, stderr=output, env=environment))
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], "\n".join((tmp_path / f"{folder.name}.txt").read_text()[-2000:] for folder in folders)
    weights = {}
    for config in CONFIGS:
        first, second = (newest(RunDirectory(folder / config / "run").checkpoints) for folder in folders)
        assert first is not None and second is not None and first.state["step"] > 5
        for file in sorted(path.name for path in first.path.glob("*.safetensors")):
            tensors, again = load_file(first.path / file), load_file(second.path / file)
            assert tensors.keys() == again.keys()
            for name, value in tensors.items():
                assert value.equal(again[name]), f"{config}, {file}: {name}"
        weights[config] = first.weights()
    # They were trained in the arithmetic that their names say.
    assert any(not value.equal(weights["cpu"][name]) for name, value in weights["cpu-bf16"].items())
