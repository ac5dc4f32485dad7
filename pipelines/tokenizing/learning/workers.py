"""A network that several workers train together."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replicated:
    """Every worker holds the whole network; gradients are averaged in the backward pass of a step's last micro-batch."""

    def __init__(self, network: nn.Module, workers: int) -> None:
        self._computed: nn.Module = DistributedDataParallel(network) if workers > 1 else network

    def __call__(self, *arguments: Any) -> Any:
        return self._computed(*arguments)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """A context manager for one forward and backward pass."""
        if last or not isinstance(self._computed, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._computed.no_sync()


def summed(values: Tensor, workers: int) -> Tensor:
    """The sum of every worker's `values`, which are left unchanged."""
    total = values.clone()
    if workers > 1:
        torch.distributed.all_reduce(total)
    return total


def gathered(values: Tensor, workers: int) -> Tensor:
    """Every worker's `values` (n, …), one after the other: (workers · n, …)."""
    if workers == 1:
        return values
    shares: Sequence[Tensor] = [torch.empty_like(values) for _ in range(workers)]
    torch.distributed.all_gather(list(shares), values.contiguous())
    return torch.cat(list(shares))
