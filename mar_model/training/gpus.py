"""Data-sheet figures of GPUs, for planning a run and for its MFU."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One kind of GPU."""

    name: str
    tflops: float  # dense bf16 matrix products at the boost clock, 10¹² operations per second
    memory_gb: float  # 10⁹ bytes
    source: str


# NVIDIA lists most figures with 2:4 sparsity, which training does not use; the dense figure is half of it.
KNOWN = {
    one.name: one
    for one in (
        GPU("h200", 989, 141, "NVIDIA H200 data sheet, SXM"),
        GPU("h100", 989, 80, "NVIDIA H100 data sheet, SXM"),
        GPU("h100-pcie", 756, 80, "NVIDIA H100 data sheet, PCIe"),
        GPU("a100-80gb", 312, 80, "NVIDIA A100 data sheet"),
        GPU("a100-40gb", 312, 40, "NVIDIA A100 data sheet"),
        GPU("l40s", 362, 48, "NVIDIA L40S data sheet"),
        GPU("l4", 121, 24, "NVIDIA L4 data sheet"),
        GPU("4090", 165, 24, "NVIDIA Ada GPU architecture white paper, GeForce RTX 4090"),
        GPU("v100-32gb", 125, 32, "NVIDIA V100 data sheet; fp16, no bf16"),
        GPU("v100-16gb", 125, 16, "NVIDIA V100 data sheet; fp16, no bf16"),
    )
}


def of_device(device_name: str) -> GPU | None:
    """The known GPU with this device name (`torch.cuda.get_device_name`), e.g. "NVIDIA A100-SXM4-80GB"; None if unknown."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    fitting = [one for one in KNOWN.values() if words.issuperset(one.name.split("-"))]
    return max(fitting, key=lambda one: len(one.name), default=None)
