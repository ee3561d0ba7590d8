"""Hours and micro-batches of GPUs that are not at hand: arithmetic over data sheets, printed in 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config

from daramgpt import cli, commands, planner, recipe
from daramgpt.errors import UserError
from daramgpt.gpu_table import GPU_TABLE
from daramgpt.planner import ModelShape, gpus
from daramgpt.run_directory import RunDirectory

TRINITY = ModelShape(n_embd=1920, n_layer=24, vocab_size=51200, num_positions=1024)
DARAMGPT = recipe.load("daramgpt")
TOKENS = planner.curriculum_tokens(DARAMGPT)


def forecast(name: str, *overrides: str) -> gpus.Forecast:
    return planner.forecast(recipe.load("daramgpt", list(overrides)), name, TRINITY, 1024, TOKENS)


def test_the_curriculum_is_about_1_3e9_tokens() -> None:
    assert pytest.approx(1.3e9, rel=0.01) == TOKENS
    assert planner.curriculum_tokens(recipe.load("daramgpt", ["curriculum.scale=0.5"])) == TOKENS / 2


@pytest.mark.parametrize("name", [*GPU_TABLE, "T4 x 2"])
def test_every_gpu_has_hours(name: str) -> None:
    found = forecast(name)
    key, count = gpus.parse(name)
    assert found.step is not None and found.step.world_size == count
    assert found.hours == pytest.approx(TOKENS / found.tokens_per_second / 3600)
    # No faster than the products alone, at the rate of the data sheet.
    flops = TOKENS * planner.step_flops(found.step.student, TRINITY, 0)
    sheet = GPU_TABLE[key]
    rate = {"fp16": sheet.fp16_teraflops, "bf16": sheet.bf16_teraflops, "fp32": sheet.fp32_teraflops}[found.step.dtype]
    assert rate is not None and found.hours > flops / (rate * 1e12 * count) / 3600
    assert found.memory_bytes < planner.MEMORY_SHARE * sheet.memory_gigabytes * 1e9


def test_a_16_gb_card_takes_eight_times_the_reference_loops_batch() -> None:
    found = forecast("T4")
    assert found.largest_tokens >= 8 * found.reference_tokens > 0
    fixed, of_position = gpus.reference_bytes(ModelShape(768, 4, 51200, 1024), TRINITY)
    # Both models in fp32, AdamW's state; the logits of both models in fp32 at least, per position.
    assert fixed == 4 * TRINITY.parameters + 16 * 68_461_056 and of_position > 2 * 4 * 51200
    assert fixed + of_position * found.reference_tokens <= planner.MEMORY_SHARE * 16e9


def test_two_gpus_halve_the_hours() -> None:
    one, two = forecast("T4"), forecast("T4 x 2")
    assert 0.45 < two.hours / one.hours < 0.55
    # Split gradients and optimizer leave more room.
    assert two.largest_tokens > one.largest_tokens


def test_products_accumulated_in_fp16_are_the_teachers_blocks_on_a_p100() -> None:
    half = "teacher.half_accumulation=true"
    plain, faster = forecast("P100"), forecast("P100", half)
    saved = plain.hours - faster.hours
    blocks = TOKENS * 2 * TRINITY.block_matrices / plain.rates.product_flops_per_second / 3600
    assert saved == pytest.approx(blocks * (1 - 9.3 / 18.7))
    assert forecast("T4", half).hours == forecast("T4").hours


def test_names() -> None:
    assert gpus.parse("t4 X 2") == ("T4", 2) and gpus.parse("NVIDIA A100 80GB PCIe") == ("A100 80GB", 1)
    assert gpus.parse("RTX 3060") == ("RTX 3060", 1)
    for wrong in ("T5", "", "T4 x 0", "x 2"):
        with pytest.raises(UserError, match="--gpu"):
            gpus.parse(wrong)


def test_what_is_printed_fits_a_terminal(tmp_path: Path) -> None:
    GPT2Config(
        vocab_size=51200, n_positions=1024, n_embd=1920, n_head=16, n_layer=24, bos_token_id=0, eos_token_id=0
    ).save_pretrained(tmp_path / "trinity")
    wanted = recipe.load("daramgpt", [f'teacher.model="{tmp_path / "trinity"}"'])
    run = RunDirectory(tmp_path / "run")
    table = commands.forecast(wanted, run, [])
    assert len(table) == len(GPU_TABLE) + 3 and max(map(len, table)) <= 80
    alone = "\n".join(commands.forecast(wanted, run, ["P100"]))
    for words in ("teacher weights", "optimizer (host)", "softmax", "9.3 TFLOP/s", "data sheet", "assumed", " times"):
        assert words in alone
    assert max(map(len, alone.splitlines())) <= 80
    assert not run.path.exists()


def test_a_run_with_its_own_teacher_has_no_forecast(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart"):
        commands.forecast(recipe.load("quickstart"), RunDirectory(tmp_path), ["T4"])


def test_the_command_line_asks_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2Config(vocab_size=51200, n_embd=1920, n_head=16, n_layer=24, bos_token_id=0, eos_token_id=0).save_pretrained(
        tmp_path
    )
    monkeypatch.chdir(tmp_path)
    command = ["daramgpt", "plan", "daramgpt", "--set", f'teacher.model="{tmp_path}"']
    monkeypatch.setattr("sys.argv", [*command, "--gpu", "T4 x 2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("T4 x 2: data sheet: 65 TFLOP/s")
    monkeypatch.setattr("sys.argv", [*command, "--gpu", "T5"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "T5" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
