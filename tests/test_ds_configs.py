"""Every configuration that ships, and every kind of file that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distilling import WIDE, Case, losses_on, make_distiller, make_teacher, plain_losses

from daramgpt import ds_config
from daramgpt.errors import UserError
from daramgpt.planner import ModelShape

NAMES = ["a100-40gb", "cpu", "cpu-bf16", "h100-80gb", "l4-24gb", "p100-16gb", "t4x2-16gb", "zero3-offload"]


def test_all_ship() -> None:
    assert ds_config.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_valid_by_name_and_by_path_and_described(name: str) -> None:
    path = ds_config.DS_CONFIGS_DIR / f"{name}.json"
    config = ds_config.load(name)
    assert config == ds_config.load(str(path)) == json.loads(path.read_text())
    assert f"`{name}`" in (ds_config.DS_CONFIGS_DIR / "README.md").read_text(encoding="utf-8")


def write(folder: Path, config: Any) -> str:
    path = folder / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def zero_3(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **section}, "zero_force_ds_cpu_optimizer": False}


ZERO_2_OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("config", "fault", "mend"),
    [
        ('{\n"fp16": {"enabled": true},\n}', "line 3", "correct the JSON"),
        ('{"fp16": {}, "fp16": {}}', '"fp16" is there twice', "delete one"),
        ([1], "an object is needed", "zero_optimization"),
        ({"zero_optimisation": {}}, '"zero_optimisation"', 'did you mean "zero_optimization"'),
        ({"zzz": 1}, '"zzz"', "known here"),
        ({"zero_optimization": {"stag": 2}}, '"zero_optimization.stag"', 'did you mean "stage"'),
        ({"zero_optimization": 2}, '"zero_optimization" needs an object', "write it as"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4", "0, 1, 2 or 3"),
        ({"train_batch_size": 16}, '"train_batch_size"', "optimizer.batch_tokens"),
        ({"train_batch_siz": 16}, '"train_batch_siz"', "optimizer.batch_tokens"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu", "engine.micro_batch_rows"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps", "delete it"),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, '"optimizer"', "[optimizer]"),
        ({"scheduler": {}}, '"scheduler"', "[schedule]"),
        ({"wandb": {"enabled": True}}, '"wandb" is not used', "delete it"),
        ({"fp16": {"enabled": "auto"}}, 'fp16.enabled is "auto"', "true or false"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto"', "true or false"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled", "enable one"),
        ({"zero_optimization": {**ZERO_2_OFFLOAD, "stage": 0}}, "needs ZeRO", "stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs ZeRO-3", "stage 3"),
        ({"bf16": {"enabled": True}}, "bf16 without ZeRO", "stage 1"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16 without ZeRO", "stage 1"),
        ({"zero_optimization": {"stage": 1}, "prescale_gradients": True}, '"prescale_gradients"', "delete it"),
        ({"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2}, "gradient_predivide_factor", "delete it"),
        (zero_3(zero_quantized_weights=True), "zero_quantized_weights is not supported here", "delete it"),
        (zero_3(zero_quantized_gradients=True), "zero_quantized_gradients is not supported here", "delete it"),
        (zero_3(stage3_module_granularity_threshold=9), "stage3_module_granularity_threshold", "delete it"),
        (zero_3(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow is not supported here", "delete it"),
        (zero_3(offload_param={"device": "nvme", "nvme_path": "/x"}), 'offload_param.device is "nvme"', '"cpu"'),
        (zero_3(offload_optimizer={"device": "nvme"}), 'offload_optimizer.device is "nvme"', '"cpu"'),
        (zero_3(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio is not", "delete it"),
        (zero_3(offload_optimizer={"device": "gpu"}), 'offload_optimizer.device is "gpu"', '"cpu" or "none"'),
        (zero_3(offload_optimizer={"devise": "cpu"}), '"zero_optimization.offload_optimizer.devise"', '"device"'),
        (zero_3(offload_param={"pin_memry": True}), '"zero_optimization.offload_param.pin_memry"', '"pin_memory"'),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states is not supported", "delete it"),
        ({"fp16": {"loss_scal": 0}}, '"fp16.loss_scal"', '"loss_scale"'),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, '"data_types.grad_acum_dtype"', '"grad_accum_dtype"'),
        ({"flops_profiler": {"profile_stp": 2}}, '"flops_profiler.profile_stp"', '"profile_step"'),
        ({"timers": {"throughput": {"enable": True}}}, '"timers.throughput.enable"', '"enabled"'),
        ({"flops_profiler": {"enabled": "auto"}}, 'flops_profiler.enabled is "auto"', "true or false"),
        ({"amp": {"enabled": True}}, '"amp" is not set here', "fp16 or bf16"),
        ({"zero_optimization": ZERO_2_OFFLOAD}, "insists on its own", '"zero_force_ds_cpu_optimizer": false'),
    ],
)
def test_a_file_that_would_mislead_is_refused_by_name(tmp_path: Path, config: Any, fault: str, mend: str) -> None:
    with pytest.raises(UserError) as refusal:
        ds_config.load(write(tmp_path, config))
    assert "mine.json" in refusal.value.fault
    assert fault in refusal.value.fault
    assert mend in refusal.value.mend


@pytest.mark.parametrize("name", ["h100", "nowhere/mine.json"])
def test_a_missing_one_names_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match="a100-40gb, cpu, cpu-bf16, h100-80gb") as refusal:
        ds_config.load(name)
    assert name in refusal.value.fault


def test_precision_and_offload_are_read() -> None:
    assert ds_config.dtype({}) == "fp32"
    assert ds_config.dtype({"fp16": {"enabled": False}, "bf16": {"enabled": True}}) == "bf16"
    assert ds_config.offloads(ds_config.load("zero3-offload"), "param")
    assert not ds_config.offloads(ds_config.load("p100-16gb"), "param")
    assert not ds_config.offloads(ds_config.load("t4x2-16gb"), "optimizer")


ASK_DEEPSPEED = """
import json, sys
from pathlib import Path
import deepspeed
from deepspeed.runtime import config, precision_config
from deepspeed.runtime.zero import config as zero, offload_config
def keys(model):
    return sorted(field.alias or name for name, field in model.model_fields.items())
sections = {
    "zero_optimization": keys(zero.DeepSpeedZeroConfig),
    "zero_optimization.offload_param": keys(offload_config.DeepSpeedZeroOffloadParamConfig),
    "zero_optimization.offload_optimizer": keys(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
    "fp16": keys(precision_config.DeepSpeedFP16Config),
    "bf16": keys(precision_config.DeepSpeedBF16Config),
}
source = "".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
given = json.loads(sys.stdin.read())
unread = [key for key in given["top"] if f'"{key}"' not in source and f"'{key}'" not in source]
for name, text in given["configs"].items():
    config.DeepSpeedConfig({**text, "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1})
print("ANSWER" + json.dumps({"sections": sections, "unread": unread}))
"""


def test_the_key_lists_are_those_of_the_installed_deepspeed() -> None:
    """A process of its own, because importing deepspeed changes logging and environment for the whole process."""
    given = {
        "top": sorted({*ds_config.TOP_LEVEL_KEYS, *ds_config.OURS, *ds_config.NOT_USED}),
        "configs": {name: ds_config.load(name) for name in NAMES},
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK_DEEPSPEED],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.rsplit("ANSWER", 1)[1])
    assert answer["unread"] == []
    # Names that DeepSpeed has deprecated are not offered.
    deprecated = {
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "stage3_gather_fp16_weights_on_model_save",
    }
    for section, keys in answer["sections"].items():
        assert set(keys) - deprecated == ds_config.SECTION_KEYS[section], section


def without_16_bits(config: dict[str, Any]) -> dict[str, Any]:
    """The same in fp32: DeepSpeed has no fp16 on a CPU, and bf16 is too coarse to be told from a wrong sum."""
    return {key: value for key, value in config.items() if key not in ("fp16", "bf16", "data_types")}


def zero(stage: int, *offloaded: str) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage} | {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    if stage == 3:
        # Otherwise a model as small as this is never split.
        section["stage3_param_persistence_threshold"] = 0
    config = {"zero_optimization": section, "zero_force_ds_cpu_optimizer": False}
    ds_config.check(config, "here")
    return config


# In fp32, as a plain loop is.
EXACT = {
    **{name: Case(without_16_bits(ds_config.load(name))) for name in NAMES},
    "zero-0": Case(zero(0)),
    **{f"zero-{stage}": Case(zero(stage)) for stage in (1, 2, 3)},
    **{f"zero-{stage}-offload": Case(zero(stage, "optimizer")) for stage in (1, 2, 3)},
    "zero-3-offload-all": Case(zero(3, "optimizer", "param")),
}
# As they are, where a CPU has their precision.
IN_BF16 = {
    f"{name} in bf16": Case(ds_config.load(name)) for name in NAMES if ds_config.dtype(ds_config.load(name)) == "bf16"
}
FORGETFUL = {f"zero-{stage} without its state": Case(zero(stage), forgets=True) for stage in (0, 1, 2, 3)}
# Under ZeRO over two ranks and over one the blocks of 256 numbers have other numbers in them.
EIGHT_BIT = {f"zero-{stage} with 8-bit moments": Case(zero(stage), "adamw-8bit", is_wide=True) for stage in (0, 2, 3)}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one-rank", "two-ranks"])
def losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return losses_on(request.param, EXACT | IN_BF16 | FORGETFUL | EIGHT_BIT, folder)


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return plain_losses(make_teacher())


@pytest.mark.parametrize("name", EXACT)
def test_each_trains_as_a_plain_loop_does(name: str, losses: dict[str, list[float]], expected: list[float]) -> None:
    assert losses[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_dropped_optimizer_state_is_noticed(name: str, losses: dict[str, list[float]], expected: list[float]) -> None:
    assert losses[name][:3] == pytest.approx(expected[:3], rel=1e-5)
    assert losses[name] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_trains_nearly_as_a_plain_loop_in_fp32(
    name: str, losses: dict[str, list[float]], expected: list[float]
) -> None:
    assert losses[name] == pytest.approx(expected, rel=1e-2)
    assert losses[name] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_moments_train_nearly_as_a_plain_loop_in_fp32(name: str, losses: dict[str, list[float]]) -> None:
    assert losses[name] == pytest.approx(plain_losses(make_teacher(), WIDE), rel=3e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_does_not_wait_for_communication_that_it_has_not(stage: int, tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    distiller = make_distiller(config, None, tmp_path / "log.txt")
    resolved = distiller.engine.zero_overlap_comm()
    distiller.close()
    # With ZeRO-3 it gives the fetching of parameters a stream of its own.
    assert resolved is (stage == 3)
    assert config["zero_optimization"]["overlap_comm"] is True


def test_a_bucket_of_the_files_without_overlap_holds_what_comes_before_the_embedding() -> None:
    """Of the 68 M student, as README.md says: 4 blocks of 768 channels."""
    blocks = ModelShape(768, 4, 51200, 1024).block_parameters
    for name in NAMES:
        zero = ds_config.load(name)["zero_optimization"]
        assert zero["overlap_comm"] is (zero["stage"] == 3)
        assert zero["stage"] == 3 or zero["reduce_bucket_size"] > blocks
