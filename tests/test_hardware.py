"""The machine as nvidia-smi tells it, and what is chosen for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from daramgpt import ds_config, gpu_table, hardware
from daramgpt.hardware import GIB, Gpu, Machine

SMI = """\
#!/bin/sh
case "$*" in
*compute_cap*) {with_capability} ;;
*) {without} ;;
esac
"""


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, with_capability: str, without: str = "exit 1") -> None:
    smi = folder / "nvidia-smi"
    smi.write_text(SMI.format(with_capability=with_capability, without=without))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def machine(name: str, mebibytes: int, capability: tuple[int, int], count: int = 1) -> Machine:
    return Machine((Gpu(name, mebibytes * 2**20, capability),) * count, 4, 16 * GIB)


CPU = Machine((), 2, 8 * GIB)
CPU_BF16 = Machine((), 2, 8 * GIB, cpu_has_bf16=True)
P100 = machine("Tesla P100-PCIE-16GB", 16280, (6, 0))
T4X2 = machine("Tesla T4", 15360, (7, 5), 2)


def test_reads_every_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "echo 'Tesla T4, 15360 MiB, 7.5'; echo 'Tesla T4, 15109 MiB, 7.5'")
    found = hardware.detect()
    assert [(gpu.name, gpu.memory_bytes, gpu.capability) for gpu in found.gpus] == [
        ("Tesla T4", 15360 * 2**20, (7, 5)),
        ("Tesla T4", 15109 * 2**20, (7, 5)),
    ]
    assert found.device == "cuda"
    assert found.gpu_memory_bytes == 15109 * 2**20
    assert found.num_cores >= 1
    assert found.memory_bytes > 2**20


def test_an_nvidia_smi_too_old_for_the_capability_is_completed_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo not a valid field; exit 2", "echo 'Tesla P100-PCIE-16GB, 16280 MiB'")
    assert hardware.detect().gpus == P100.gpus


@pytest.mark.parametrize("output", ["exit 9", "echo 'No devices were found'", "true"])
def test_a_failing_nvidia_smi_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    fake_smi(tmp_path, monkeypatch, output)
    assert hardware.detect().device == "cpu"


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("0,7,1", 1), ("GPU-ab", 1)])
def test_visible_devices_are_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo 'Tesla T4, 15360 MiB, 7.5'; echo 'Tesla T4, 15360 MiB, 7.5'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(hardware.detect().gpus) == count


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_names_are_looked_up_word_by_word(name: str, key: str) -> None:
    assert gpu_table.rates(name) is gpu_table.GPU_TABLE[key]


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA A10G", "NVIDIA GeForce GTX 1080", ""])
def test_a_gpu_that_is_not_in_the_table_is_not_taken_for_a_similar_one(name: str) -> None:
    assert gpu_table.rates(name) is None


@pytest.mark.parametrize(
    ("on", "dtype", "config", "pin"),
    [
        (CPU, "fp32", "cpu", "2.13.0"),
        (CPU_BF16, "bf16", "cpu-bf16", "2.13.0"),
        (P100, "fp16", "p100-16gb", "2.7.1"),
        (machine("Tesla V100-SXM2-16GB", 16384, (7, 0)), "fp16", "t4x2-16gb", "2.7.1"),
        (T4X2, "fp16", "t4x2-16gb", "2.13.0"),
        (machine("NVIDIA L4", 23034, (8, 9)), "bf16", "l4-24gb", "2.13.0"),
        (machine("NVIDIA GeForce RTX 4060", 8188, (8, 9)), "bf16", "l4-24gb", "2.13.0"),
        (machine("NVIDIA A100-SXM4-40GB", 40960, (8, 0)), "bf16", "a100-40gb", "2.13.0"),
        (machine("NVIDIA H100 80GB HBM3", 81559, (9, 0)), "bf16", "h100-80gb", "2.13.0"),
        (machine("Tesla M40", 11448, (5, 2)), "fp32", "cpu", "2.7.1"),
    ],
)
def test_choices(on: Machine, dtype: str, config: str, pin: str) -> None:
    choices = hardware.choose(on)
    assert (choices.dtype, choices.ds_config, choices.torch_pin) == (dtype, config, pin)
    assert choices.teacher_precision == "int8"
    assert set(choices.reasons) == {"dtype", "teacher_precision", "ds_config", "torch_pin"}
    # The configuration that is chosen trains in the precision that is chosen, and the machine can.
    assert ds_config.dtype(ds_config.load(config)) == dtype
    assert hardware.dtype_fault(on, dtype) is None


@pytest.mark.parametrize(
    ("on", "dtype", "candidates"),
    [
        (CPU, "fp32", ("int8", "fp32")),
        (CPU, "bf16", ("int8", "bf16")),
        (P100, "fp16", ("int8", "fp16", "fp32")),
        (machine("Tesla M40", 11448, (5, 2)), "fp32", ("int8", "fp32")),
        (machine("Tesla V100-SXM2-16GB", 16384, (7, 0)), "fp16", ("int8", "fp16")),
        (T4X2, "fp16", ("int8", "llm-int8", "fp16")),
        (T4X2, "fp32", ("int8", "llm-int8", "fp16", "fp32")),
        (machine("NVIDIA H100 80GB HBM3", 81559, (9, 0)), "bf16", ("int8", "llm-int8", "bf16")),
        (machine("NVIDIA H100 80GB HBM3", 81559, (9, 0)), "fp32", ("int8", "llm-int8", "bf16", "fp32")),
    ],
)
def test_a_teachers_precisions_begin_with_the_smallest(on: Machine, dtype: str, candidates: tuple[str, ...]) -> None:
    assert hardware.teacher_candidates(on, dtype) == candidates
    # What capability alone chooses is what is taken where nothing can be measured.
    assert hardware.choose(on).teacher_precision == candidates[0]


@pytest.mark.parametrize(
    ("text", "has_bf16"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f amx_tile amx_bf16 amx_int8\n", True),
        ("flags\t\t: fpu avx512_bf16\nflags\t\t: fpu avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_bf16_of_a_cpu_is_read_from_its_flags(monkeypatch: pytest.MonkeyPatch, text: str, has_bf16: bool) -> None:
    read_text = Path.read_text

    def fake(path: Path, *arguments: str, **options: str) -> str:
        return text if str(path) == "/proc/cpuinfo" else read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", fake)
    assert hardware.detect().cpu_has_bf16 is has_bf16


def test_a_gpu_decides_whatever_the_cpu_has() -> None:
    with_gpu = Machine(P100.gpus, 2, 8 * GIB, cpu_has_bf16=True)
    assert hardware.choose(with_gpu).dtype == "fp16"


def test_the_weakest_gpu_decides() -> None:
    mixed = Machine((*T4X2.gpus, *P100.gpus), 4, 16 * GIB)
    assert mixed.capability == (6, 0)
    assert hardware.choose(mixed).torch_pin == "2.7.1"


def test_bf16_on_a_t4_is_a_fault_though_torch_emulates_it() -> None:
    assert "8.0" in str(hardware.dtype_fault(T4X2, "bf16"))


@pytest.mark.parametrize(
    ("arch_list", "capability", "covered"),
    [
        (["sm_50", "sm_60", "sm_70"], (6, 0), True),
        (["sm_60"], (6, 1), True),  # same major version, minor from the built one up
        (["sm_61"], (6, 0), False),
        (["sm_75", "sm_80"], (6, 0), False),
        (["sm_80"], (8, 9), True),
        (["sm_80"], (9, 0), False),  # machine code ends at its major version
        (["sm_80", "compute_80"], (9, 0), True),  # PTX does not
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_120"], (12, 0), True),
        ([], (8, 0), False),
        (["gfx90a"], (9, 0), False),
    ],
)
def test_kernels_cover(arch_list: list[str], capability: tuple[int, int], covered: bool) -> None:
    assert hardware.kernels_cover(arch_list, capability) is covered


def test_a_cpu_torch_is_no_torch_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in str(hardware.torch_fault(P100))
    assert hardware.torch_fault(CPU) is None


def test_a_torch_without_kernels_for_the_p100_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    assert "no sm_60 kernels" in str(hardware.torch_fault(P100))
    assert hardware.torch_fault(T4X2) is None


def test_parse_version() -> None:
    assert hardware.parse_version("2.10.0+cu128") == (2, 10, 0)
    assert hardware.parse_version("2.13.0a0+git12") > hardware.TORCH_FLOOR
