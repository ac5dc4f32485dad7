"""Correctness checks of a device: golden records, precisions, compiled blocks, graphs, training, memory, the tokenizer."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import parity
from benchmarks.gpu.bench import Bench, Line, Trainer, autocast, float32_products, line, made_model, timed, within, without_dropout
from mar_model import MAR, GenerationOptions, SampleNoise, TokenSampler, TrainingDraws, generate
from mar_model.noise import to_device
from mar_model.tokenizers import KLAutoencoder
from mar_model.training.footprint import activation_bytes, parameter_count
from mar_model.training.recipe import micro_batch_draws

SAME = {"loss": 1e-4, "gradient": 1e-3}  # relative root mean squares, caused by another order of float32 sums
BF16 = {"loss": 2e-2, "gradient": 5e-2}
DRAWN = {"float32": 1e-3, "bf16": 1e-1}  # deviations accumulate over sampling steps
KL = {"float32": 1e-4, "tf32": 5e-3, "bf16": 3e-2}  # of the posterior means, in units of their standard deviation
MEMORY, COMPILED_LOSS = 0.05, 0.01
FEW_STEPS = GenerationOptions(ar_steps=4, diffusion_steps=8, guidance=2.0)


def golden(bench: Bench) -> Iterator[Line]:
    """Golden records of the release, in float32."""
    float32_products(tf32=False)
    files = sorted(bench.records.glob("mar_tiny_patches.safetensors" if bench.tiny else "*.safetensors"))
    if not files:
        yield line("golden", "records", f"no *.safetensors in {bench.records}: set their folder with --records", False)
    for path in files:
        try:
            for row in parity.rows(parity.Record(path, bench.device)):
                name = f"{path.stem} {row.quantity}"
                if row.error is None:
                    yield line("golden", name, row.remark)
                else:
                    yield within("golden", name, row.error, row.bound, remark=row.remark)
        except parity.NoRecord as error:
            yield line("golden", path.stem, f"not checked: {error}"[:160])


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative root mean square of the difference."""
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def precision(bench: Bench) -> Iterator[Line]:
    """Losses and gradients of one forward and backward pass, and a generation, each compared with eager float32."""
    float32_products(tf32=False)
    images = 3 if bench.tiny else 8
    config = without_dropout(bench.config("base"))
    draws, _ = micro_batch_draws(config, images, max(1, config.tokens * 7 // 8), seed=1, images_seen=0, micro_batch=0)
    shape = (images, config.latent_channels, config.latent_size, config.latent_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    labels = (torch.arange(images) % config.classes).to(bench.device)
    there = TrainingDraws(*(to_device(one, bench.device) for one in draws))

    def passed(model: MAR, kind: str) -> dict[str, Tensor]:
        model.zero_grad()
        with autocast(bench, kind):
            loss = model(latents, labels, draws.timesteps.shape[2], there)[0].total
        loss.mean().backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        return {"loss": loss.detach(), "gradient": gradient}

    def drawn(model: MAR, kind: str, token_sampler: TokenSampler | None = None) -> Tensor:
        with autocast(bench, kind):
            noise = SampleNoise(0, range(images), bench.device)
            return generate(model, labels.cpu(), noise, FEW_STEPS, token_sampler=token_sampler)

    model = made_model(bench, config, filled=True)
    exact, exact_drawn = passed(model, "float32"), drawn(model, "float32")

    def compared(name: str, kind: str, bounds: dict[str, float]) -> Iterator[Line]:
        found = passed(model, kind)
        for quantity, bound in bounds.items():
            yield within("precision", f"{name}: {quantity}", relative(found[quantity], exact[quantity]), bound)

    yield from compared("bf16", "bf16", BF16)
    yield within("precision", "bf16: generation", relative(drawn(model, "bf16"), exact_drawn), DRAWN["bf16"])
    graph = TokenSampler(model.diffloss.net, cuda_graph=True)
    for turn in ("captured", "replayed"):
        found = relative(drawn(model, "float32", token_sampler=graph), exact_drawn)
        yield within("precision", f"graph, {turn}: generation", found, DRAWN["float32"])
    in_bf16 = TokenSampler(model.diffloss.net, dtype=torch.bfloat16, cuda_graph=True)
    found = relative(drawn(model, "bf16", token_sampler=in_bf16), exact_drawn)
    yield within("precision", "graph, bf16: generation", found, DRAWN["bf16"])
    del graph, in_bf16
    model.recompute_activations()
    yield from compared("checkpointed", "float32", SAME)
    model.recompute = model.diffloss.net.recompute = False
    began = time.monotonic()
    model.compile_blocks(bench.backend)
    yield from compared("compiled", "float32", SAME)
    yield from compared("compiled bf16", "bf16", BF16)
    yield within("precision", "compiled: generation", relative(drawn(model, "float32"), exact_drawn), DRAWN["float32"])
    yield line("compiling", "base, first passes", f"{time.monotonic() - began:.1f} s", seconds=time.monotonic() - began)


def training(bench: Bench) -> Iterator[Line]:
    """20 steps on one batch: losses are finite, decrease, and agree with those of compiled blocks."""
    float32_products(tf32=False)
    found: dict[str, list[float]] = {}
    for name in ("eager", "compiled"):
        trainer = Trainer(
            bench, bench.config("base"), 8 if bench.tiny else 64, compiled=name == "compiled", learning_rate=1e-3 if bench.tiny else 2e-4,
            steps_apart=True,
        )  # fmt: skip
        losses = found[name] = torch.stack([trainer.step() for _ in range(20)]).tolist()
        finite = all(map(math.isfinite, losses))
        yield line("training_steps", f"{name}: finite", f"{sum(map(math.isfinite, losses))} of 20", finite, losses=losses)
        first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        yield line("training_steps", f"{name}: falling", f"{first:.4f} → {last:.4f}", last < first, first=first, last=last)
        del trainer
        bench.clean()
    error = max(abs(one - other) / abs(one) for one, other in zip(found["eager"], found["compiled"], strict=True))
    yield within("training_steps", "compiled against eager", error, COMPILED_LOSS)


def synchronisation(bench: Bench) -> Iterator[Line]:
    """No synchronisation inside a training step or an AR step, detected by PyTorch's sync debug mode."""
    config = bench.config("base")
    for name in ("training step, eager", "training step, compiled", "AR step"):
        if not bench.cuda:
            yield line("synchronisation", name, "not checked: torch.cuda.set_sync_debug_mode needs CUDA")
            continue
        error = ""
        try:
            if name == "AR step":
                _generate_strictly(bench, made_model(bench, config))
            else:
                trainer = Trainer(bench, config, 8, compiled="compiled" in name)
                for _ in range(3):
                    trainer.step()
                torch.cuda.set_sync_debug_mode("error")
                for _ in range(3):
                    trainer.step()
        except RuntimeError as raised:
            error = f"{raised} ({_place(raised)})"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield line("synchronisation", name, error[:200] or "none", not error, error=error)


def _generate_strictly(bench: Bench, model: MAR) -> None:
    def after_step(step: int, latents: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if step < 3 else "default")  # not for the code after the last step

    with autocast(bench, "bf16"):
        noise = SampleNoise(0, range(4), bench.device)
        generate(model, torch.arange(4), noise, GenerationOptions(ar_steps=5, diffusion_steps=4, guidance=2.0), after_step=after_step)


def _place(error: BaseException) -> str:
    """The file and line in this project's code that raised the error."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "mar_model" in file:
            place = f"{file.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def memory(bench: Bench) -> Iterator[Line]:
    """Stored activations, and on CUDA the peak of a step, compared with `mar_model.training.footprint`."""
    images, config = 64, bench.config("base")
    if bench.tiny:  # wide enough that terms missing in the formula are small
        widths = {"encoder_width": 192, "decoder_width": 256, "denoiser_width": 320, "latent_size": 16, "latent_channels": 16}
        images, config = 2, without_dropout(bench.config("base", **widths))
    parameters, kind = parameter_count(config), "bf16" if bench.cuda else "float32"
    trainer = Trainer(bench, config, images, precision=kind, masked=config.tokens)
    planned = images * activation_bytes(config, config.tokens, value_bytes=2 if bench.cuda else 4)
    trainer.step()
    draws = TrainingDraws(*(to_device(one, bench.device) for one in trainer.draws))
    labels = trainer.labels.to(bench.device)
    bench.synchronize()
    bench.clean()
    own = {one.untyped_storage().data_ptr() for one in (*trainer.model.parameters(), *draws, trainer.latents, labels)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = torch.cuda.memory_allocated(bench.device) if bench.cuda else 0
    watched = nullcontext() if bench.cuda else torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with watched, autocast(bench, kind):
        loss = trainer.model(trainer.latents, labels, trainer.masked, draws)[0].total
    found = torch.cuda.memory_allocated(bench.device) - before - 2 * parameters if bench.cuda else sum(kept.values())
    yield _planned("activations", found, planned, images=images)
    del loss, draws
    if not bench.cuda:
        yield line("memory", "peak of a step", "not measured: needs CUDA")
        return
    bench.clean()
    torch.cuda.reset_peak_memory_stats(bench.device)
    trainer.step()
    bench.synchronize()
    yield _planned("peak of a step", torch.cuda.max_memory_allocated(bench.device), 22 * parameters + planned, images=images)


def _planned(name: str, found: float, planned: float, **values: Any) -> Line:
    error = abs(found / planned - 1)
    summary = f"{found / 1e9:.4g} GB, planned {planned / 1e9:.4g} GB: {found / planned - 1:+.1%}, bound {MEMORY:.0%}"
    return line("memory", name, summary, error <= MEMORY, error=error, bound=MEMORY, gb=found / 1e9, planned_gb=planned / 1e9, **values)


@torch.inference_mode()
def tokenizer(bench: Bench) -> Iterator[Line]:
    """Moments on the device in each precision compared with float32 on the CPU, channels-last as in the stage cache."""
    config, side = bench.kl()
    torch.manual_seed(0)
    network = KLAutoencoder(config).eval()
    images = torch.rand(2, 3, side, side) * 2 - 1
    exact = network.encode(images)[:, : config.channels]
    network = network.to(bench.device).to(memory_format=torch.channels_last)
    there = images.to(bench.device)
    for kind, bound in KL.items():
        float32_products(tf32=kind == "tf32")
        with autocast(bench, kind):
            means = network.encode(there).float()[:, : config.channels].cpu()
        error = float((means - exact).double().square().mean().sqrt() / exact.double().std())
        yield within("tokenizer", f"KL encoding, {kind}", error, bound)
    float32_products(tf32=False)


@torch.no_grad()
def peak_products(bench: Bench) -> float:
    """The measured FLOP/s of large bf16 products (on a CPU: float32)."""
    side, dtype = 512 if bench.tiny else 8192, torch.bfloat16 if bench.cuda else torch.float32
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return float(2 * side**3 / timed(bench, lambda: a @ b, repetitions=5, at_most=5.0, inner=5).low)
