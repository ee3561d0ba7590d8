"""The speed measurement: what it counts, and the reference loop it compares with. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import machine, reference_loop, sentence_lengths, throughput, throughput_result
from benchmarks.inputs import SHAPES
from benchmarks.ladder import Work
from benchmarks.ladder_plan import Settings
from benchmarks.sides import Repetition
from benchmarks.throughput_result import Measurement
from daramgpt import planner


def test_committed_lengths_are_a_distribution_that_pads_as_known() -> None:
    lengths = sentence_lengths.load()
    assert sum(lengths.counts.values()) > 100_000 and min(lengths.counts) >= 1
    shares = [lengths.padding_share(batch, 1024) for batch in (1, 8, 16, 32)]
    assert shares[0] == pytest.approx(0, abs=1e-9)
    assert 0.5 < shares[1] < shares[2] < shares[3] < 0.85
    assert shares[2] == pytest.approx(0.69, abs=0.01)


def test_drawn_lengths_are_cut_and_repeatable() -> None:
    lengths = sentence_lengths.SentenceLengths({2: 1, 50: 1})
    drawn = lengths.draw(200, 10, np.random.default_rng(3))
    assert set(drawn) == {2, 10}
    assert drawn == lengths.draw(200, 10, np.random.default_rng(3))


def test_lengths_are_counted_in_tokens() -> None:
    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[0] * len(text.split()) for text in texts]}

    lengths = sentence_lengths.token_lengths(["a b", "c", "d e", ""], tokenizer)  # type: ignore[arg-type]
    assert list(lengths) == [2, 1, 2]


def test_neighbours_are_padded_to_their_longest() -> None:
    assert sentence_lengths.padding_in_order([1, 1, 9, 9, 5], batch=2) == 0
    assert sentence_lengths.padding_in_order([1, 9, 1, 9], batch=2) == pytest.approx(1 - 20 / 36)


def test_histogram_file_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = sentence_lengths.SentenceLengths({3: 7, 11: 2})
    monkeypatch.setattr(sentence_lengths, "HISTOGRAM", tmp_path / "lengths.json")
    sentence_lengths.write_histogram(lengths, 100, tmp_path / "lengths.json")
    assert sentence_lengths.load() == lengths


def test_reference_batches_are_padded_to_the_longest() -> None:
    stream = torch.arange(100, 140)
    sentences = reference_loop.PaddedSentences(stream, [3, 5] * 16)
    batches = list(reference_loop.batches(sentences, pad_token_id=0))
    assert len(batches) == 2
    input_ids, mask = batches[0]
    assert input_ids.shape == mask.shape == (16, 5)
    assert input_ids[0].tolist() == [100, 101, 102, 0, 0] and mask[0].tolist() == [1, 1, 1, 0, 0]
    assert input_ids[1].tolist() == [103, 104, 105, 106, 107]
    # The stream of 40 tokens is read again from its start when it ends.
    assert input_ids[10].tolist() == [100, 101, 102, 0, 0]


@pytest.fixture
def loop(tmp_path: Path) -> reference_loop.ReferenceLoop:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "n_positions": 16, "n_head": 2, "n_layer": 1}
    GPT2LMHeadModel(GPT2Config(n_embd=24, **sizes)).save_pretrained(tmp_path)
    student = GPT2LMHeadModel(GPT2Config(n_embd=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes))
    return reference_loop.ReferenceLoop(tmp_path, student, torch.device("cpu"))


def test_reference_loop_computes_the_articles_loss(loop: reference_loop.ReferenceLoop) -> None:
    """KL summed over every position, padding too, divided by the number of sentences alone; 0.1 of cross-entropy."""
    input_ids, mask = reference_loop.pad([[1, 2, 3, 4, 5], [6, 7]], pad_token_id=0)
    with torch.no_grad():
        student = loop.student(input_ids, attention_mask=mask).logits
        teacher = loop.teacher(input_ids, attention_mask=mask).logits
    log_q, log_p = (torch.log_softmax(logits.double() / 2, dim=-1) for logits in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum() / 2
    targets = [(0, 0, 2), (0, 1, 3), (0, 2, 4), (0, 3, 5), (1, 0, 7)]
    ce = -sum(torch.log_softmax(student[row, place].double(), dim=-1)[token] for row, place, token in targets) / 5
    assert loop.step(input_ids, mask) == pytest.approx((4 * kl + 0.1 * ce).item(), rel=1e-5)


def test_reference_loop_trains_the_student_only(loop: reference_loop.ReferenceLoop) -> None:
    input_ids, mask = reference_loop.pad([[1, 2, 3, 4, 5], [6, 7]], pad_token_id=0)
    before = {name: value.clone() for name, value in loop.teacher.state_dict().items()}
    losses = [loop.step(input_ids, mask) for _ in range(30)]
    assert losses[-1] < losses[15] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in loop.teacher.state_dict().items())


def test_full_shape_is_the_reference_run() -> None:
    """About 2.8 GFLOP a token, most of it the teacher's."""
    assert SHAPES["full"].flops_per_token(1024) == pytest.approx(2.8e9, rel=0.03)


SETTINGS = Settings("bf16", "int8", "cpu-bf16", 4, 1, 655, 655, 110.0, 2_700_000)


def _measurement(name: str, dtype: str, useful: int, seconds: list[float], largest: int | None) -> Measurement:
    repetitions = {
        number: Repetition(Work(useful, 1000, 2, 500, 22.0, 3.0), second, 3_000_000 + number)
        for number, second in enumerate(seconds)
    }
    return Measurement(name, dtype, 500, repetitions, {128: 1_000_000}, 3.0, largest)


def _result(*names: str) -> dict[str, Any]:
    measurements = [
        _measurement("daramgpt", "bf16", 1000, [1.0, 0.5, 0.5], 4000),
        _measurement("reference-loop", "fp32", 320, [1.0, 2.0, 100.0], 400),
    ]
    kept = {entry.name: entry for entry in measurements if entry.name in (names or ("reference-loop", "daramgpt"))}
    rates = {"fp32": 1e12, "bf16": 2e12}
    return throughput_result.result(
        "small", SHAPES["small"], 16 * 10**9, SETTINGS, kept, {"trl-gkd": "trl is not installed"}, rates, False
    )


def test_result_has_the_documented_keys_and_definitions() -> None:
    result = _result()
    assert result["padding_share"] == pytest.approx(0.68)
    reference, ours = result["rows"]
    assert reference["useful_tokens_per_second"] == pytest.approx(160), "the median, not the mean"
    assert reference["micro_batch_tokens"] == 500 and reference["peak_memory_bytes"] == 3_000_002
    flops = SHAPES["small"].flops_per_token(22)
    assert reference["model_flops_per_token"] == flops
    assert reference["roofline_fraction"] == pytest.approx(160 * flops / 1e12), "products in the row's own dtype"
    assert ours["roofline_fraction"] == pytest.approx(2000 * flops / 2e12)
    assert result["gemm_flops_per_second"] == 2e12
    assert ours["curriculum_hours"] == pytest.approx(1.3e9 / 2000 / 3600)
    assert result["micro_batch_over_reference"] == pytest.approx(10)
    assert result["left_out"] == {"trl-gkd": "trl is not installed"} and result["not_measured"] == []


def test_speedup_is_that_of_a_round() -> None:
    """1,000, 2,000 and 2,000 tokens/s over 320, 160 and 3.2: the median of the ratios is no ratio of medians."""
    result = _result()
    assert result["speedup_over_reference"] == pytest.approx(2000 / 160)
    ours = result["rows"][1]
    assert ours["over_reference"] == result["speedup_over_reference"]
    assert ours["lowest_and_highest_over_reference"] == pytest.approx([1000 / 320, 2000 / 3.2])


def test_what_was_not_run_is_null_and_named() -> None:
    result = _result("daramgpt")
    absent = {"padding_share", "speedup_over_reference", "micro_batch_over_reference"}
    assert all(result[key] is None for key in absent) and absent <= set(result["not_measured"])
    assert result["rows"][0]["over_reference"] is None and "over_reference" in result["not_measured"]


def test_readme_explains_every_key() -> None:
    readme = (Path(throughput.__file__).parent / "README.md").read_text(encoding="utf-8")
    result = _result()
    keys = {key for key in result if key != "rows"} | set(result["rows"][0]) - {"name"}
    assert not [key for key in sorted(keys) if f"| `{key}` |" not in readme]


def test_result_is_written_with_hardware_and_versions(tmp_path: Path) -> None:
    machine.write_result(_result(), tmp_path / "out" / "result.json")
    written = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert written["hardware"]["num_cores"] >= 1 and "torch" in written["versions"]
    assert [row["name"] for row in written["rows"]] == ["reference-loop", "daramgpt"]


def test_table_names_the_sides_and_what_was_left_out() -> None:
    lines = throughput_result.format_result(_result()).splitlines()
    assert lines[1].startswith("reference-loop") and lines[2].startswith("daramgpt")
    assert len({len(line) for line in lines[:3]}) == 1, "columns are aligned"
    assert "12.50" in lines[2] and "12.50" in lines[3] and "10.0" in lines[3]
    assert lines[-1] == "left out: trl-gkd: trl is not installed"
    assert throughput_result.format_result(_result("daramgpt"))


def test_the_plans_prediction_stands_beside_what_was_measured() -> None:
    result = _result()
    result["plan"]["predicted_tokens_per_second"] = 1.1 * result["rows"][1]["useful_tokens_per_second"]
    result["plan"]["predicted_peak_bytes"] = round(0.95 * result["rows"][1]["peak_memory_bytes"])
    line = throughput_result.format_result(result).splitlines()[-2]
    assert "plan's arithmetic for daramgpt" in line and "(+10.0% of measured)" in line and line.endswith("(-5.0%)")
    result["plan"]["predicted_tokens_per_second"] = None
    assert "arithmetic" not in throughput_result.format_result(result)


def test_gemm_rate_is_a_rate() -> None:
    assert planner.gemm_rate("fp32", [64], torch.device("cpu"), seconds=0.01) > 1e6


def test_peak_memory_counts_from_its_start() -> None:
    """In a process of its own: this one may hold freed memory that a new tensor would take without growing."""
    script = """
import torch
from benchmarks import machine
memory = machine.PeakMemory(torch.device("cpu"))
memory.start()
held = torch.ones(10_000_000)
assert held.nbytes * 0.5 < memory.read_bytes() < held.nbytes * 2, memory.read_bytes()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
