"""Numerical precision of a worker's matrix products."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from pipelines.runtime.cluster.settings import ClusterSettings


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 natively: CUDA from Ampere on, x86 processors with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return not {"amx_bf16", "avx512_bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def resolved(precision: str, cluster: ClusterSettings) -> Literal["bf16", "float32"]:
    """Resolve `auto` for this cluster's workers, so that a run records its precision and keeps it when it resumes on other hardware.

    With GPUs it is bf16; without GPUs it is bf16 if this machine's processor multiplies bf16 natively, else float32.
    """
    if precision == "auto":
        return "bf16" if cluster.gpus_per_worker or bf16_is_fast(torch.device("cpu")) else "float32"
    return "bf16" if precision == "bf16" else "float32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast for `precision`: `bf16`, `float32`, or `auto` (bf16 if the hardware supports it natively).

    Raises ValueError for any other name.
    """
    if precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision is {precision!r}, expected auto, bf16 or float32")
    enabled = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
