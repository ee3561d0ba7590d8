"""What is known of GPUs without having one: compute capability, memory, rates, from their data sheets.

Only the standard library is imported, as in `hardware`, which completes what an old nvidia-smi leaves out from here.
A product of matrices does not reach the data sheet's rate: `gemm_share` says which share of it is counted on, and
`SHARE_SOURCES` where that is from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Capability = tuple[int, int]
# TFLOP/s of products that are accumulated in fp16 (`teacher.half_accumulation`), where that is faster: data sheet.
HALF_ACCUMULATION_TERAFLOPS = {"P100": 18.7}
# Of the memory bandwidth on the data sheet, what passes over large tensors reach: assumed, not measured.
BANDWIDTH_SHARE = 0.8
# Of the data sheet's rate of products, by the words of a GPU's name; else GEMM_SHARE.
GEMM_SHARE = 0.7
GEMM_SHARES = {"P100": 0.93, "T4": 24 / 65}
SHARE_SOURCES = {
    "P100": "assumed for large products: at 9.3 TFLOP/s they compute long enough to hide their memory traffic",
    "T4": "24 TFLOP/s in a loop of 4096-row fp16 products, held there by its 70 W (measured by others: "
    "forums.developer.nvidia.com/t/264462)",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """Data-sheet values of a GPU: dense products, in TFLOP/s, and memory bandwidth in GB/s.

    16-bit rates are those with fp32 accumulation where the data sheet gives both; None = not supported.
    """

    capability: Capability
    memory_gigabytes: int
    fp32_teraflops: float
    fp16_teraflops: float
    bf16_teraflops: float | None
    bandwidth_gigabytes_per_second: int


# The words of a key all occur in the name that nvidia-smi gives; the key with most words wins.
GPU_TABLE: dict[str, Rates] = {
    # Data sheet: 18.7 fp16, with fp16 accumulation; the libraries accumulate in fp32, at the fp32 rate.
    "P100": Rates((6, 0), 16, 9.3, 9.3, None, 732),
    "V100": Rates((7, 0), 16, 14.0, 112.0, None, 900),  # data sheet, PCIe
    "V100 SXM2": Rates((7, 0), 16, 15.7, 125.0, None, 900),  # data sheet
    "T4": Rates((7, 5), 16, 8.1, 65.0, None, 320),  # data sheet
    "L4": Rates((8, 9), 24, 30.3, 121.0, 121.0, 300),  # data sheet, without sparsity
    "A10": Rates((8, 6), 24, 31.2, 125.0, 125.0, 600),  # data sheet
    # GeForce: 16-bit products with fp32 accumulation run at twice the fp32 rate (half of what tensor cores could).
    "RTX 3060": Rates((8, 6), 12, 12.7, 25.5, 25.5, 360),  # data sheet, GA106
    "RTX 3070": Rates((8, 6), 8, 20.3, 40.6, 40.6, 448),  # data sheet, GA104
    "RTX 3080": Rates((8, 6), 10, 29.8, 59.5, 59.5, 760),  # data sheet, GA102
    "RTX 3090": Rates((8, 6), 24, 35.6, 71.0, 71.0, 936),  # data sheet, GA102
    "RTX 4060": Rates((8, 9), 8, 15.1, 30.2, 30.2, 272),  # data sheet, Ada
    "RTX 4070": Rates((8, 9), 12, 29.1, 58.3, 58.3, 504),  # data sheet, Ada
    "RTX 4080": Rates((8, 9), 16, 48.7, 97.5, 97.5, 717),  # data sheet, Ada
    "RTX 4090": Rates((8, 9), 24, 82.6, 165.2, 165.2, 1008),  # data sheet, Ada
    "RTX 5070": Rates((12, 0), 12, 30.9, 61.7, 61.7, 672),  # data sheet, Blackwell
    "RTX 5080": Rates((12, 0), 16, 56.3, 112.6, 112.6, 960),  # data sheet, Blackwell
    "RTX 5090": Rates((12, 0), 32, 104.8, 209.5, 209.5, 1792),  # data sheet, Blackwell
    "A100": Rates((8, 0), 40, 19.5, 312.0, 312.0, 1555),  # data sheet
    "A100 80GB": Rates((8, 0), 80, 19.5, 312.0, 312.0, 1935),  # data sheet, PCIe
    "H100": Rates((9, 0), 80, 67.0, 989.0, 989.0, 3350),  # data sheet, SXM
    "H100 PCIE": Rates((9, 0), 80, 51.0, 756.0, 756.0, 2000),  # data sheet
    "H200": Rates((9, 0), 141, 67.0, 989.0, 989.0, 4800),  # data sheet, SXM
}


def rates(gpu_name: str) -> Rates | None:
    """Rates of the GPU that nvidia-smi calls `gpu_name`; None where `GPU_TABLE` lacks it."""
    key = table_key(gpu_name)
    return None if key is None else GPU_TABLE[key]


def table_key(gpu_name: str) -> str | None:
    """The key of `GPU_TABLE` whose words all occur in the name, the one with most words; None where there is none."""
    words = set(re.split(r"[^A-Z0-9]+", gpu_name.upper()))
    matches = [key for key in GPU_TABLE if set(key.upper().split()) <= words]
    return max(matches, key=lambda key: len(key.split()), default=None)


def gemm_share(key: str) -> tuple[float, str]:
    """Share of its data sheet's rate of products that a GPU of the table is counted on for, and where that is from."""
    return GEMM_SHARES.get(key, GEMM_SHARE), SHARE_SOURCES.get(key, "assumed, not measured")
