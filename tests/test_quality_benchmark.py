"""`benchmarks.quality`: its yardstick, what it concludes from curves, and the command on a tiny pair."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_texts
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from benchmarks import quality, quality_runs, quality_yardstick
from daramgpt import recipe as recipes
from daramgpt import student
from daramgpt.engine import without_rank
from daramgpt.evaluation.held_out import CausalModel, measure
from daramgpt.recipe import Shape

DOCUMENTS = {"novels": ["옛날에 한 사람이\n살았다.", "그는 밥을 먹었다! " * 30], "petitions": ["내일도 먹을까? 😀"]}


def row(name: str, seed: int, *points: tuple[float, float, float]) -> dict[str, Any]:
    curve = [dict(zip(("seconds", "tokens", "bits_per_byte"), point, strict=True)) for point in points]
    return quality._row(name, seed, curve)


def test_the_recipe_learns_as_the_full_one_does(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(quality_runs.make_recipe(tmp_path, tmp_path, (64, 2, 1)), encoding="utf-8")
    own, full = recipes.load(str(file)), recipes.load("daramgpt")
    assert (own.loss, own.optimizer, own.schedule) == (full.loss, full.optimizer, full.schedule)
    assert [stage.name for stage in own.curriculum.stages] == [stage.name for stage in full.curriculum.stages]


def test_shares_are_those_of_the_worst_seed_at_the_first_point_that_is_no_worse() -> None:
    rows = [
        row("reference loop, 0.1", 0, (10, 100, 9.0)),
        row("reference loop", 0, (500, 1000, 2.5), (1000, 2000, 2.0)),
        row("random", 0, (5, 50, 3.0), (10, 100, 2.0)),
        row("random", 1, (5, 50, 2.9), (10, 100, 1.75)),
        row("projected", 0, (4, 10, 2.0), (8, 100, 1.5)),
        row("projected", 1, (4, 10, 2.25), (8, 40, 1.75), (9, 50, 1.7)),
        row("without teacher", 0, (3, 100, 2.5)),
        row("without teacher", 1, (3, 100, 2.25)),
    ]
    found = quality.conclusions(rows)
    assert found["seconds_share"] == {"random": 0.01, "projected": 0.008}
    assert found["tokens_share"] == 0.4
    closed = quality_runs.gap_closed(rows, 1.0, quality.BASELINE, quality.SETTINGS)
    assert closed["random"] == pytest.approx([0.5 / 1.5, 0.5 / 1.25]) and closed["pruned"] == []
    assert closed["projected"] == pytest.approx([1.0 / 1.5, 0.55 / 1.25])


def test_who_never_gets_there_has_no_share() -> None:
    rows = [row("reference loop", 0, (1000, 2000, 1.0)), row("random", 0, (10, 100, 2.0))]
    assert quality.conclusions(rows) == {"seconds_share": {"random": None}, "tokens_share": None}
    # A setting that was not measured is not in it.
    assert quality.conclusions([row("random", 0, (10, 100, 2.0))]) == {"seconds_share": {}, "tokens_share": None}


def write_yardstick(folder: Path) -> None:
    folder.mkdir()
    for name, documents in DOCUMENTS.items():
        (folder / f"{name}.txt").write_text("\n\n".join(documents) + "\n\n", encoding="utf-8")


def test_the_yardstick_is_all_of_the_text_and_weighs_its_bytes(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    write_yardstick(tmp_path / "heldout")
    yardstick = quality_yardstick.read(tmp_path / "heldout", tmp_path / "texts" / "tokenizer", 0, 16)
    model = student.build(Shape(n_embd=16, n_head=2, n_layer=1), 300, 512, 0, seed=1).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "texts" / "tokenizer")
    nats = 0.0
    for documents in DOCUMENTS.values():
        ids = [0]
        for text in documents:
            ids += [*tokenizer(text.strip("\n"), add_special_tokens=False).input_ids, 0]
        # A row sees what is in it, and predicts the first token of the next.
        for start in range(0, len(ids) - 1, 16):
            piece = torch.tensor(ids[start : start + 17])
            with torch.no_grad():
                nats += float(F.cross_entropy(model(piece[None, :-1]).logits[0], piece[1:], reduction="sum"))
    texts = [text.rstrip("\n") for documents in DOCUMENTS.values() for text in documents]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert yardstick.text_bytes == num_bytes
    found = measure(CausalModel(model), yardstick, ["all"], 2**40).bits_per_byte["all"]
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    # The first document of each kind is left.
    thinned = quality_yardstick.read(tmp_path / "heldout", tmp_path / "texts" / "tokenizer", 0, 16, every=2)
    assert thinned.text_bytes == sum(len(documents[0].encode()) for documents in DOCUMENTS.values())


def call(tmp_path: Path, module: str, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"benchmarks.{module}", "--corpus", str(tmp_path / "texts" / "corpora")]
    line += ["--teacher", str(tmp_path / "teacher"), "--heldout", str(tmp_path / "heldout"), *options]
    root = str(Path(__file__).parents[1])
    environment = {**without_rank(os.environ), "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)


def make_pair(folder: Path) -> None:
    """Corpora, a text that is none of them, and a tiny teacher."""
    make_texts(folder / "texts")
    write_yardstick(folder / "heldout")
    model = student.build(Shape(n_embd=32, n_head=2, n_layer=2), 300, 32, 0, seed=1)
    model.save_pretrained(folder / "teacher")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "texts" / "tokenizer")
    tokenizer.save_pretrained(folder / "teacher")
    for name in ("unpublished", "wiki", "written"):
        (folder / "texts" / "corpora" / name).symlink_to(folder / "texts" / "corpora" / "web")


@pytest.mark.slow
def test_a_tiny_pair_is_compared_what_is_there_is_not_made_again_and_a_sweep_trains_the_same(tmp_path: Path) -> None:
    make_pair(tmp_path)
    of_both = ["--student", "16/2/1", "--scale", "0.0003", "--json", str(tmp_path / "found.json")]
    common = [*of_both, "--seeds", "1", "--settings", "random", "--reference-scale", "0.0003", "--minutes", "0.01"]
    common += ["--rates", "1e-3,1e-2", "--set", "optimizer.batch_tokens=128"]
    ended = call(tmp_path, "quality", *common)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    names = [line["name"] for line in found["rows"]]
    assert names == ["reference loop, 0.001", "reference loop, 0.01", "reference loop", "random", "without teacher"]
    for line in found["rows"]:
        assert [point["tokens"] for point in line["curve"]] == sorted(point["tokens"] for point in line["curve"])
        assert 0 < line["bits_per_byte"] < 20 and line["seconds"] > 0
    ours, without = found["rows"][-2:]
    assert ours["tokens"] == without["tokens"] and ours["bits_per_byte"] != without["bits_per_byte"]
    assert "of the gap to the teacher closed" in ended.stdout
    again = call(tmp_path, "quality", *common)
    assert again.returncode == 0 and json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]

    variants = ["same optimizer.batch_tokens=128", "muon optimizer.batch_tokens=256 optimizer=muon"]
    variants += ["projected student.init=projected student.calibration_tokens=1024 loss.hidden_weight=2"]
    swept = call(
        tmp_path, "sweep", *of_both, "--baseline", "muon", *(word for one in variants for word in ("--variant", one))
    )
    assert swept.returncode == 0, swept.stderr[-2000:]
    result = json.loads((tmp_path / "found.json").read_text())
    same, muon, projected = result["rows"]
    assert result["teacher_bits_per_byte"] == pytest.approx(found["teacher_bits_per_byte"], rel=1e-6)
    # The command itself has trained that one.
    assert (same["tokens"], same["bits_per_byte"]) == (ours["tokens"], pytest.approx(ours["bits_per_byte"], rel=1e-4))
    assert len({one["bits_per_byte"] for one in result["rows"]}) == 3
    first = [one["curve"][0]["bits_per_byte"] for one in (same, muon, projected)]
    assert first[0] == first[1] != first[2]
    assert "optimizer=muon" in swept.stdout and "projected: " in swept.stdout
    way = muon["bits_per_byte"] - result["teacher_bits_per_byte"]
    assert result["gap_closed"]["same"] == [pytest.approx((muon["bits_per_byte"] - same["bits_per_byte"]) / way)]


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("one student.init=layers student.init_model=other", "knows no student.init=layers"),
        ("optimizer.batch_tokens=128", "has no name"),
        ("one optimizer.batch=128", 'unknown key "optimizer.batch"'),
    ],
)
def test_a_variant_that_cannot_be_is_refused_in_one_line(variant: str, said: str, tmp_path: Path) -> None:
    ended = call(tmp_path, "sweep", "--variant", variant)
    assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    ended = call(tmp_path, "quality", "--settings", "best")
    assert ended.returncode == 2 and "there is no best" in ended.stderr and "Traceback" not in ended.stderr
