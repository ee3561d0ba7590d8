"""The loss measurement: its rows against a plain computation, its errors, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import loss, loss_sides
from benchmarks.loss_sides import Case, Finished, Inputs, RefusedError
from daramgpt.losses import distillation_loss_reference

VOCAB, TOKENS = 300, 40


def case(name: str, dtype: str = "fp32") -> Case:
    return Case(name, dtype, VOCAB, TOKENS, chunk_tokens=16)


class SideHere:
    """A side in this process: no process takes its seconds to start, and no memory is watched."""

    def __init__(self, case: Case) -> None:
        if case.name == "trl-gkd":
            raise RefusedError("ImportError: it wants another torch")
        if case.name == "fused-compiled":
            raise RefusedError("InvalidCxxCompiler: No working C++ compiler found")
        self.case, self.inputs = case, Inputs.random(case, torch.device("cpu"))
        self.compute = loss_sides.BUILDERS[case.name](self.inputs, case)
        self.value = float(loss_sides._step(self.compute, self.inputs))

    def repeat(self) -> float:
        return 2.0 if self.case.name == "products" else 4.0

    def finish(self) -> Finished:
        return Finished(1000, self.value)


@pytest.fixture
def sides_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "Side", SideHere)
    monkeypatch.setattr(loss_sides, "STUDENT_WIDTH", 16)
    monkeypatch.setattr(loss_sides, "TEACHER_WIDTH", 24)
    monkeypatch.setattr(loss, "ACCURACY_TOKENS", 20)
    # Peers are looked for by their names.
    monkeypatch.setattr(loss_sides, "PEERS", {"trl-gkd": "torch", "liger-jsd": "a_package_that_nobody_has"})


@pytest.mark.usefixtures("sides_here")
def test_rows_are_those_of_a_plain_computation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    arguments = ["--vocab", str(VOCAB), "--tokens", str(TOKENS), "--chunk", "16", "--json", str(file)]
    assert loss.main([*arguments, "--dtype", "fp32", "bf16"]) == 0
    output = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["hardware"] and "torch" in result["versions"]
    rows = {(row["name"], row["dtype"]): row for row in result["rows"]}
    others = ("fused-reverse-kl", "fused-jsd", "fused-skew-kl", "fused-hidden")
    names = ("products", "plain", "fused", *others)
    assert set(rows) == {(name, dtype) for name in names for dtype in ("fp32", "bf16")}
    inputs = Inputs.random(case("plain"), torch.device("cpu"))
    kd, ce = distillation_loss_reference(
        inputs.student_hidden @ inputs.student_weight.T,
        inputs.teacher_hidden @ inputs.teacher_weight.T,
        inputs.labels,
        2.0,
    )
    expected = float((kd + 0.1 * ce).detach()) / TOKENS
    assert rows["plain", "fp32"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert rows["fused", "fp32"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows["fused", "bf16"]["loss"] == pytest.approx(expected, rel=2e-2)
    assert all(rows[name, "fp32"]["loss"] != pytest.approx(expected, rel=1e-3) for name in others)
    assert 0 < rows["fused-hidden", "fp32"]["loss"] - expected < 2
    fused = rows["fused", "fp32"]
    assert (fused["seconds"], fused["tokens_per_second"], fused["floor_share"]) == (4.0, TOKENS / 4, 0.5)
    assert rows["products", "fp32"]["loss"] is None and rows["products", "fp32"]["peak_memory_bytes"] is None
    fp32, bf16 = result["errors"]
    for key in ("value", "grad_hidden", "grad_weight"):
        assert 0 < fp32[key] < 1e-5 < bf16[key] < 3e-2
    assert "not installed" in result["left_out"][f"liger-jsd fp32 {VOCAB}x{TOKENS}"]
    assert "another torch" in result["left_out"][f"trl-gkd fp32 {VOCAB}x{TOKENS}"] and "left out: trl-gkd" in output


def test_a_side_in_its_process_counts_what_the_loss_holds() -> None:
    """Whole fp32 logits of both models, at the least; the gradients do not count."""
    measured = Case("plain", "fp32", 20_000, 200, 16)
    side = loss_sides.Side(measured)
    assert side.repeat() > 0
    finished = side.finish()
    logits_bytes = 4 * measured.vocab_size * measured.tokens
    assert 2 * logits_bytes < finished.peak_bytes < 30 * logits_bytes
    assert finished.loss > 0


def test_whole_logits_that_do_not_fit_are_left_out() -> None:
    large = Case("plain", "fp32", 51_200, 16_384, 1024)
    assert "whole logits need" in (loss_sides.fault(large, 16 * 10**9) or "")
    assert loss_sides.fault(large, 10**12) is None
    assert loss_sides.fault(Case("fused", "fp32", 51_200, 16_384, 1024), 16 * 10**9) is None


@pytest.mark.parametrize("option", ["--vocab", "--tokens", "--chunk", "--repetitions"])
def test_what_cannot_be_measured_is_refused_in_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert loss.main([option, "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{option} 0" in line
