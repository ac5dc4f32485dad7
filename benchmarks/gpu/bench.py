"""Shared by all parts of the benchmark: device, sizes, remaining time, result lines, timings."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar_model import MAR, Architecture, MARConfig
from mar_model.config import PUBLISHED
from mar_model.masking import masked_tokens, mean_mask_ratio
from mar_model.tokenizers import KLConfig
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import initial_weights, micro_batch_draws, parameter_groups
from mar_model.training.step import OptimizerStep, forward_backward
from mar_model.training.strategies import Replicated

Line = dict[str, Any]
TINY = Architecture(  # for all sizes with --tiny, so that all parts share compiled code
    encoder_depth=2, encoder_width=64, encoder_heads=2, decoder_depth=2, decoder_width=64, decoder_heads=2, buffer_size=4,
    denoiser_depth=2, denoiser_width=64,
)  # fmt: skip


def line(kind: str, name: str, summary: str, passed: bool | None = None, **values: Any) -> Line:
    """One result. `passed` is None if there is no bound; the table shows `summary`."""
    return {"kind": kind, "name": name, "passed": passed, "summary": summary, **values}


def within(kind: str, name: str, error: float, bound: float, **values: Any) -> Line:
    """A result line for an error that must be at most `bound` (NaN fails)."""
    return line(kind, name, f"error {error:.2e}, bound {bound:.0e}", error <= bound, error=error, bound=bound, **values)


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    device: torch.device
    tiny: bool
    deadline: float  # of time.monotonic()
    peak: float  # FLOP/s of dense bf16 products
    records: Path
    release: Path | None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """The backend for torch.compile. On a CPU, where inductor would compile C++ for minutes, the captured graph runs eagerly."""
        return "inductor" if self.cuda else "eager"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def config(self, size: str, **changes: Any) -> MARConfig:
        """The configuration of base, large or huge."""
        sizes = {"latent_size": 4, "latent_channels": 8, "classes": 10} if self.tiny else {}
        architecture = TINY if self.tiny else PUBLISHED[f"mar_{size}"]
        return MARConfig(**{**vars(architecture), **sizes, **changes})

    def kl(self) -> tuple[KLConfig, int]:
        """The tokenizer's configuration and the image side in pixels."""
        small = KLConfig(channels=8, width=32, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)
        return (small, 32) if self.tiny else (KLConfig(), 256)

    def seconds_for(self, flops: float, share: float = 0.15) -> float:
        """A conservative estimate of the seconds, for this share of the peak."""
        return 0.0 if self.tiny else flops / (share * self.peak)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Release unused memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def float32_products(tf32: bool) -> None:
    """Whether float32 products and convolutions may use TF32 (factors of 10 bits)."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


@dataclass(frozen=True)
class Timing:
    """Seconds per repetition."""

    median: float
    low: float
    high: float
    repetitions: int

    def values(self) -> dict[str, float]:
        return {"seconds": self.median, "seconds_min": self.low, "seconds_max": self.high, "repetitions": self.repetitions}


def timed(bench: Bench, work: Callable[[], object], *, repetitions: int, at_most: float, inner: int = 1) -> Timing:
    """Time `work`, run `inner` times per repetition and synchronised. No repetition starts after `at_most` seconds."""
    found: list[float] = []
    began = time.perf_counter()
    while not found or (len(found) < repetitions and time.perf_counter() - began + found[-1] * inner < at_most):
        bench.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            work()
        bench.synchronize()
        found.append((time.perf_counter() - start) / inner)
    return Timing(statistics.median(found), min(found), max(found), len(found))


def made_model(bench: Bench, config: MARConfig, filled: bool = False) -> MAR:
    """The model, created on the device. `filled`: also initialise zero weights randomly, because they would hide preceding layers."""
    torch.manual_seed(initial_weights(0))
    with bench.device:
        model = MAR(config)
    if filled:
        for parameter in model.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def autocast(bench: Bench, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@dataclass
class Trainer:
    """Training steps like the worker's, on one micro-batch of random latents with precomputed draws."""

    bench: Bench
    config: MARConfig
    images: int
    precision: str = "bf16"
    compiled: bool = False
    recompute: bool = False
    learning_rate: float = 1e-4
    masked: int = 0  # 0: the mean number
    steps_apart: bool = False  # change the seed of dropout in every step

    def __post_init__(self) -> None:
        bench, config, images = self.bench, self.config, self.images
        self.masked = self.masked or masked_tokens(config.tokens, mean_mask_ratio())
        self.model = made_model(bench, config).train()
        if self.compiled:
            self.model.compile_blocks(bench.backend)
        if self.recompute:
            self.model.recompute_activations()
        strategy = Replicated(self.model, workers=1)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.02), lr=self.learning_rate, betas=(0.9, 0.95), fused=True)
        self.average = WeightAverage(self.model, 0.9999, warmup=False)
        self.optimizer_step = OptimizerStep(self.model, optimizer, [self.average], strategy, 3.0, micro_batches=1, workers=1, requests=2)
        self.draws, self.seed = micro_batch_draws(config, images, self.masked, seed=0, images_seen=0, micro_batch=0)
        shape = (images, config.latent_channels, config.latent_size, config.latent_size)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
        self.labels = torch.arange(images) % config.classes
        self.steps = 0

    def forward_backward(self) -> tuple[Tensor, Tensor]:
        """The mean loss (zero-dimensional) and whether it is finite, on the device."""
        loss, _, finite = forward_backward(
            self.model, self.latents, self.labels, self.masked, self.draws, self.seed + self.steps * self.steps_apart,
            1 / (self.draws.timesteps.numel()), autocast(self.bench, self.precision),
        )  # fmt: skip
        return loss.total.detach().mean(), finite

    def step(self) -> Tensor:
        """Take one step and return its loss on the device."""
        loss, finite = self.forward_backward()
        self.optimizer_step.settle(self.steps)
        self.optimizer_step(finite.logical_not().float()[None], [False, False])
        self.steps += 1
        return loss


def without_dropout(config: MARConfig) -> MARConfig:
    return replace(config, attention_dropout=0.0, projection_dropout=0.0)
