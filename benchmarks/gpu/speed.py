"""Speed of training, generation and encoding at the published sizes, compared with the release if a checkout is given."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Line, Timing, Trainer, autocast, float32_products, line, made_model, timed
from benchmarks.gpu.profiling import profiled
from benchmarks.released_code import ReleasedModel
from mar_model import MAR, GenerationOptions, MARConfig, SampleNoise, TokenSampler, generate
from mar_model.flops import generation_flops, tokenizer_flops, training_flops
from mar_model.masking import masked_tokens, mean_mask_ratio
from mar_model.tokenizers import KLAutoencoder

GUIDANCE = 3.0  # of every generation
BATCHES = (128, 96, 64, 32)  # the published micro-batch, and smaller ones if it does not fit
# Size and code, the most important first. huge fits most cards only with activation checkpointing.
TRAINED = (("large", "compiled"), ("large", "release"), ("large", "eager"))
TRAINED_TOO = (
    ("base", "compiled"), ("base", "release"), ("base", "eager"), ("huge", "compiled checkpointed"), ("huge", "eager checkpointed"),
)  # fmt: skip
ANNEALED: dict[str, Any] = {"diffusion_steps": 50, "diffusion_steps_end": 5}
REUSED: dict[str, Any] = {"reuse_steps": 3}
INTERVAL: dict[str, Any] = {"guidance_interval": (0.1, 0.6)}
Variants = tuple[tuple[str, dict[str, Any]], ...]
GENERATED: Variants = (
    ("compiled graphs", {}),
    ("compiled graphs, all fast modes", {**ANNEALED, **REUSED, **INTERVAL}),
    ("release", {}),
)
GENERATED_TOO: Variants = (
    ("eager", {}),
    ("compiled", {}),
    ("graphs", {}),
    ("compiled graphs, diffusion steps from 50 to 5", ANNEALED),
    ("compiled graphs, features reused for 3 steps", REUSED),
    ("compiled graphs, guidance from 0.1 to 0.6", INTERVAL),
)
EXACT = ("compiled graphs", "eager", "compiled", "graphs")
LONGEST = 40.0  # maximum seconds for the repetitions of one variant of generation


class _Enough(Exception):
    """Raised after the warm-up steps of a variant."""


def skipped(kind: str, name: str, bench: Bench, needed: float) -> Line:
    return line(kind, name, f"skipped: needs about {needed:.0f} s, but {max(bench.left(), 0):.0f} s of --minutes remain", skipped=True)


def failed(kind: str, name: str, error: BaseException) -> Line:
    text = " ".join(str(error).split())
    return line(kind, name, f"{type(error).__name__}: {text}"[:200], False, error=f"{type(error).__name__}: {text}"[:2000])


def training_speed(variants: Sequence[tuple[str, str]], bench: Bench) -> Iterator[Line]:
    """Whole steps: forward, backward, clipping, AdamW, average. MFU: `mar_model.flops` over the data sheet's dense bf16."""
    for size, code in variants:
        name = f"{size} {code}"
        if code == "release" and bench.release is None:
            yield line("training", name, "not measured: --release was not given")
            continue
        needed = 15 + bench.seconds_for(60 * training_flops(bench.config(size), BATCHES[0], 222)) if not bench.tiny else 0.0
        if bench.left() < needed:
            yield skipped("training", name, bench, needed)
            continue
        try:
            yield from _trained(bench, size, code)
        except (Exception, SystemExit) as error:
            yield failed("training", name, error)
        bench.clean()


def _trained(bench: Bench, size: str, code: str) -> Iterator[Line]:
    config = bench.config(size)
    masked = masked_tokens(config.tokens, mean_mask_ratio())
    for images in (4,) if bench.tiny else BATCHES:
        try:
            step = _released_step(bench, config, images, masked) if code == "release" else _own_step(bench, config, images, code)
            began = time.monotonic()
            _repeat(step, 1 if bench.tiny else 5)
            bench.synchronize()
            first = time.monotonic() - began
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats(bench.device)
            timing = timed(bench, step, repetitions=3 if bench.tiny else 7, at_most=12.0, inner=1 if bench.tiny else 5)
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None  # whose frames reference the model
            step = None
            bench.clean()
            yield line("training", f"{size} {code} at {images}", "out of memory", images=images)
            continue
        yield _training_line(bench, config, f"{size} {code}", images, masked, timing, first)
        if (size, code) == ("large", "compiled"):
            yield profiled(bench, f"training {size} {code}", functools.partial(_repeat, step, 3))
        return


def _repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def _training_line(bench: Bench, config: MARConfig, name: str, images: int, masked: int, timing: Timing, first: float) -> Line:
    flops = training_flops(config, images, masked)
    gb = torch.cuda.max_memory_allocated(bench.device) / 1e9 if bench.cuda else None
    values = {
        "images_per_second": images / timing.median, "tflops": flops / timing.median / 1e12, "mfu": flops / timing.median / bench.peak,
        "gb": gb, "images": images, "masked": masked, "warm_up_seconds": first, **timing.values(),
    }  # fmt: skip
    summary = f"{values['images_per_second']:.1f} images/s, {values['tflops']:.3g} TFLOP/s, MFU {values['mfu']:.1%}"
    return line("training", name, summary if gb is None else f"{summary}, {gb:.1f} GB, {images} images", **values)


def _own_step(bench: Bench, config: MARConfig, images: int, code: str) -> Callable[[], object]:
    return Trainer(bench, config, images, compiled="compiled" in code, recompute="checkpointed" in code).step


def _released_step(bench: Bench, config: MARConfig, images: int, masked: int) -> Callable[[], object]:
    """The release's step including its moving average, which `ReleasedModel` omits."""
    release = _release(bench, config)
    latents = torch.randn(images, config.latent_channels, config.latent_size, config.latent_size, device=bench.device)
    labels = torch.arange(images, device=bench.device) % config.classes
    weights = list(release.model.parameters())
    averages = [one.detach().clone() for one in weights]

    def step() -> None:
        release.train_step(latents, labels, masked)
        for average, weight in zip(averages, weights, strict=True):
            average.mul_(0.9999).add_(weight.detach(), alpha=1e-4)

    return step


def _release(bench: Bench, config: MARConfig, diffusion_steps: int = 100) -> ReleasedModel:
    assert bench.release is not None
    return ReleasedModel(bench.release, config, bench.device, 1e-4, diffusion_steps)


def generation(variants: Variants, bench: Bench) -> Iterator[Line]:
    """Latents of a batch of large, 64 AR steps of 100 diffusion steps, guided."""
    config = bench.config("large")
    images, ar_steps, diffusion_steps = (2, 4, 4) if bench.tiny else (256, 64, 100)
    models: dict[bool, MAR] = {}
    for name, fast in variants:
        if name == "release" and bench.release is None:
            yield line("generation", name, "not measured: --release was not given")
            continue
        steps = {"ar_steps": ar_steps, "diffusion_steps": diffusion_steps, **(_small(fast) if bench.tiny else fast)}
        flops = generation_flops(config, images, GenerationOptions(guidance=GUIDANCE, **steps))
        needed = bench.seconds_for((2 if "graphs" in name else 1.2) * flops)
        if bench.left() < needed:
            yield skipped("generation", name, bench, needed)
            continue
        try:
            if name == "release":
                work, warm_up = _released_generation(bench, config, images, ar_steps, diffusion_steps)
            else:
                model = models.get("compiled" in name) or _model(bench, config, "compiled" in name)
                models["compiled" in name] = model
                work, warm_up = _own_generation(bench, model, images, "graphs" in name, steps)
            began = time.monotonic()
            warm_up()
            bench.synchronize()
            first = time.monotonic() - began
            timing = timed(bench, work, repetitions=3, at_most=min(LONGEST, max(bench.left() / 3, 0.0)))
        except (Exception, SystemExit) as error:
            yield failed("generation", name, error)
            error.__traceback__ = None
            bench.clean()
            continue
        seconds = timing.median / images
        yield line(
            "generation", name, f"{seconds:.4f} s/image, {flops / timing.median / 1e12:.3g} TFLOP/s", seconds_an_image=seconds,
            images=images, tflops=flops / timing.median / 1e12, mfu=flops / timing.median / bench.peak, warm_up_seconds=first, **steps,
            **timing.values(),
        )  # fmt: skip
        if name == "compiled graphs":
            yield profiled(bench, f"generation large {name}", functools.partial(work, profiled_steps=3))
        bench.clean()


def _small(fast: dict[str, Any]) -> dict[str, Any]:
    return {name: {"diffusion_steps": 4, "diffusion_steps_end": 2}.get(name, value) for name, value in fast.items()}


def _model(bench: Bench, config: MARConfig, compiled: bool) -> MAR:
    model = made_model(bench, config, filled=True).eval()
    if compiled:
        model.compile_blocks(bench.backend)
    return model


def _own_generation(
    bench: Bench, model: MAR, images: int, graphs: bool, steps: dict[str, Any]
) -> tuple[Callable[..., Tensor | None], Callable[[], object]]:
    """One batch, and its warm-up: the whole batch for graphs, which are captured then, otherwise three AR steps."""
    token_sampler = TokenSampler(model.diffloss.net, dtype=torch.bfloat16 if graphs else None, cuda_graph=graphs)
    labels, drawn = torch.arange(images) % model.config.classes, GenerationOptions(guidance=GUIDANCE, **steps)
    kept_noise = SampleNoise(0, range(images), bench.device)  # drawn outside the timing, because drawing takes a second on the CPU

    def work(profiled_steps: int | None = None) -> Tensor | None:
        def after_step(step: int, latents: Tensor) -> None:
            if profiled_steps is not None and step + 1 == profiled_steps:
                raise _Enough

        try:
            with autocast(bench, "bf16"):
                noise = SampleNoise(0, range(images), bench.device) if profiled_steps is None else kept_noise
                return generate(model, labels, noise, drawn, token_sampler=token_sampler, after_step=after_step)
        except _Enough:
            return None

    return work, work if graphs else functools.partial(work, profiled_steps=3)


def _released_generation(
    bench: Bench, config: MARConfig, images: int, ar_steps: int, diffusion_steps: int
) -> tuple[Callable[..., Tensor | None], Callable[[], object]]:
    release = _release(bench, config, diffusion_steps)
    labels = torch.arange(images, device=bench.device) % config.classes
    return functools.partial(release.generate, labels, ar_steps, GUIDANCE), functools.partial(release.generate, labels[:8], 2, GUIDANCE)


@torch.inference_mode()
def encoding(bench: Bench) -> Iterator[Line]:
    """Images/s of the tokenizer's encoder, channels-last as in the stage cache."""
    config, side = bench.kl()
    images = 2 if bench.tiny else 64
    torch.manual_seed(0)
    network = KLAutoencoder(config).eval().to(bench.device).to(memory_format=torch.channels_last)
    pixels = torch.rand(images, 3, side, side, device=bench.device).to(memory_format=torch.channels_last)
    flops = images * tokenizer_flops(config, side).encode
    for kind in ("bf16", "tf32", "float32"):
        if bench.left() < bench.seconds_for(20 * flops, 0.03):
            yield skipped("encoding", kind, bench, bench.seconds_for(20 * flops, 0.03))
            continue
        float32_products(tf32=kind == "tf32")
        with autocast(bench, kind):
            network.encode(pixels)
            timing = timed(bench, lambda: network.encode(pixels), repetitions=5, at_most=10.0, inner=1 if bench.tiny else 3)
        rate = images / timing.median
        yield line(
            "encoding", kind, f"{rate:.1f} images/s, {flops / timing.median / 1e12:.3g} TFLOP/s", images_per_second=rate,
            tflops=flops / timing.median / 1e12, images=images, **timing.values(),
        )  # fmt: skip
    float32_products(tf32=False)
