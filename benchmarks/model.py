"""Training and generation of one model on one device: images/s, seconds per image, FLOPs, MFU, peak memory.

    python -m benchmarks.model [--what train|generate|both] [--preset base|large|huge] [--precision float32 bf16] [--batch 4]
    python -m benchmarks.model --release DIR        # compare with the release's code: git clone https://github.com/LTH14/mar DIR
    python -m benchmarks.model --what generate --diffusion-steps-end 5 --reuse-steps 3 --guidance-interval 0.1 0.7   # the fast modes too

Needs only torch, numpy and safetensors. All contestants alternate in one process; the medians of --runs after --warmup runs count. A
training step is forward, backward, clipping and AdamW on random latents, with the share --mask-ratio of the tokens masked. FLOPs are the
necessary ones (`mar_model.flops`, also for the release, which computes more). MFU is FLOP/s over the device's peak: the data sheet's
in bf16, else the best measured product. With both precisions, the deviation of bf16 from float32 on the same draws is printed. Peak
memory includes the weights of all contestants.
"""

import argparse
import contextlib
import functools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.released_code import ReleasedModel
from mar_model import MAR, GenerationOptions, MARConfig, SampleNoise, TokenSampler, TrainingDraws, generate
from mar_model.config import PUBLISHED
from mar_model.flops import generation_flops, training_flops
from mar_model.linear import Linear
from mar_model.masking import masked_tokens
from mar_model.noise import to_device
from mar_model.training.gpus import of_device
from mar_model.training.recipe import initial_weights, micro_batch_draws, parameter_groups
from pipelines.runtime.cluster.host_memory import keep_freed_memory

LEARNING_RATE = 1e-4


class OurModel:
    """This project's model, used like in the training worker and the generation stage."""

    def __init__(self, config: MARConfig, device: torch.device, options: argparse.Namespace) -> None:
        self.device, self.options = device, options
        torch.manual_seed(initial_weights(0))
        self.model = MAR(config).to(device)
        for parameter in self.model.parameters():  # weights of zero would hide preceding layers
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.02), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        if options.recompute:
            self.model.recompute_activations()
        if options.compile:
            self.model.compile_blocks()
        self.steps = 0

    def precision(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=name == "bf16")

    def losses(self, precision: str, latents: Tensor, labels: Tensor, masked: int) -> Tensor:
        draws, dropout_seed = micro_batch_draws(self.model.config, len(labels), masked, seed=0, images_seen=self.steps, micro_batch=0)
        draws = TrainingDraws(*(to_device(one, self.device) for one in draws))
        torch.manual_seed(dropout_seed)
        with self.precision(precision):
            return self.model(latents, labels, masked, draws)[0].total  # type: ignore[no-any-return]

    def train_step(self, precision: str, latents: Tensor, labels: Tensor, masked: int) -> None:
        self.model.train()
        self.losses(precision, latents, labels, masked).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def generate(self, precision: str, labels: Tensor, **fast: Any) -> Tensor:
        noise, options = SampleNoise(0, range(len(labels)), self.device), self.options
        with self.precision(precision):
            chosen = generation_options(options, **fast)
            return generate(self.model, labels, noise, chosen, token_sampler=self._token_sampler(precision))

    @functools.cache  # noqa: B019  # the model exists as long as the process
    def _token_sampler(self, precision: str) -> TokenSampler:
        """Set up like the generation stage: with graphs, the weights are copied in their precision at the first image."""
        copied = torch.bfloat16 if self.options.graph and precision == "bf16" else None
        return TokenSampler(self.model.diffloss.net, dtype=copied, cuda_graph=self.options.graph)

    @torch.no_grad()
    def deviation(self, latents: Tensor, labels: Tensor, masked: int, drawn: dict[str, Tensor]) -> dict[str, float]:
        """The deviation of bf16 from float32 on the same draws: relative for the loss, relative RMS for the others."""
        self.model.eval()
        found: dict[str, dict[str, Tensor]] = {"loss": {}, "z": {}, "generated": drawn}
        kept = micro_batch_draws(self.model.config, len(labels), masked, seed=1, images_seen=0, micro_batch=0)[0].orders[:, masked:]
        kept = to_device(kept.sort(dim=1).values, self.device)
        for name in ("float32", "bf16"):
            found["loss"][name] = self.losses(name, latents, labels, masked).mean()
            with self.precision(name):
                embedding = self.model.class_embedding(labels, torch.zeros_like(labels, dtype=torch.bool))
                found["z"][name] = self.model.decode(self.model.encode(self.model.patchify(latents), kept, embedding), kept).float()
        return {
            name: float((by["bf16"] - by["float32"]).square().mean().sqrt() / by["float32"].square().mean().sqrt())
            for name, by in found.items()
            if len(by) == 2
        }


def measured_peak(device: torch.device, precision: str) -> float:
    """TFLOP/s of the fastest of forty 2048³ products."""
    side = 2048
    layer, x = Linear(side, side, bias=False).to(device), torch.randn(side, side, device=device)
    best = float("inf")
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        for _ in range(40):
            best = min(best, timed(lambda: layer(x), device))
    return 2 * side**3 / best / 1e12


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, synchronised with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class PeakMemory:
    """Peak memory in GiB: of one run on a CUDA device; elsewhere resident memory of the process, which holds all models."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif platform.system() == "Linux":
            Path("/proc/self/clear_refs").write_text("5")  # reset the process's peak

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        if platform.system() == "Linux":
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def by_turns(contestants: dict[str, Callable[[], object]], device: torch.device, warmup: int, runs: int) -> dict[str, dict[str, Any]]:
    """Seconds of each run after the warm-up, with alternating contestants, and the peak memory of the last run."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contestants}
    for turn in range(warmup + runs):
        for name, work in contestants.items():
            peak = PeakMemory(device)
            seconds = timed(work, device)
            if turn >= warmup:
                found[name]["seconds"].append(seconds)
            found[name]["peak_memory_gib"] = round(peak.read(), 2)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'work':<9} {'code':<8} {'precision':<9} {'s/run':>8} {'images/s':>9} {'s/image':>8} ", end="")
    print(f"{'TFLOP/s':>8} {'MFU':>6} {'GiB':>7}  faster than")
    for row in rows:
        same = [one for one in rows if one["what"] == row["what"]]
        against = next((one for one in same if one["code"] == "release"), same[0])
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{row['what']:<9} {row['code']:<8} {row['precision']:<9} {row['seconds']:>8.3f} {row['images_per_second']:>9.3f} "
            f"{1 / row['images_per_second']:>8.3f} {row['tflops']:>8.2f} {mfu:>6} {row['peak_memory_gib']:>7.2f}  "
            f"{against['code']} {against['precision']}: {against['seconds'] / row['seconds']:.2f}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("train", "generate", "both"), default="train")
    parser.add_argument("--preset", choices=[name.removeprefix("mar_") for name in PUBLISHED], default="base")
    parser.add_argument("--denoiser", metavar="DEPTH/WIDTH", help="another denoiser than the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--mask-ratio", type=float, default=0.867, help="the recipe's mean")
    parser.add_argument("--ar-steps", type=int, default=8)
    parser.add_argument("--diffusion-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--diffusion-steps-end", type=int, metavar="N", help="fast: decrease the diffusion steps to N over the AR steps")
    parser.add_argument("--reuse-steps", type=int, metavar="N", help="fast: after each complete AR step, N steps reuse features")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="fast: guidance in a part of the noise")
    parser.add_argument("--graph", action="store_true", help="run the denoiser's loop as a CUDA graph (on a CPU: with static buffers)")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the blocks")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--release", type=Path, metavar="DIR", help="a checkout of LTH14/mar to run beside")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device; default: data sheet, on a CPU a measured product")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def generation_options(options: argparse.Namespace, **fast: Any) -> GenerationOptions:
    """How both codes draw; `fast`: what `fast_modes` returns."""
    return GenerationOptions(ar_steps=options.ar_steps, diffusion_steps=options.diffusion_steps, guidance=options.guidance, **fast)


def fast_modes(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` from the options."""
    given = {name: getattr(options, name) for name in ("diffusion_steps_end", "reuse_steps", "guidance_interval")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None}


def contestants(
    what: str, options: argparse.Namespace, ours: OurModel, release: ReleasedModel | None, latents: Tensor, labels: Tensor, masked: int,
    drawn: dict[str, Tensor],
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """The contestants, by `code precision`; generations are stored in `drawn`."""

    def keep(precision: str) -> None:
        drawn[precision] = ours.generate(precision, labels)

    fast = fast_modes(options)

    found: dict[str, Callable[[], object]] = {}
    for precision in options.precision:
        if what == "train":
            found[f"ours {precision}"] = partial(ours.train_step, precision, latents, labels, masked)
        else:
            found[f"ours {precision}"] = partial(keep, precision)
            if fast:
                found[f"fast {precision}"] = partial(ours.generate, precision, labels, **fast)
    if release is not None:
        theirs: dict[str, Callable[[], object]] = {
            "train": partial(release.train_step, latents, labels, masked),
            "generate": partial(release.generate, labels, options.ar_steps, options.guidance),
        }
        found[f"release {release.precision}"] = theirs[what]
    return found


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    keep_freed_memory()  # for everything here, like the workers
    architecture = PUBLISHED[f"mar_{options.preset}"]
    if options.denoiser:
        depth, width = (int(part) for part in options.denoiser.split("/"))
        architecture = replace(architecture, denoiser_depth=depth, denoiser_width=width)
    config = MARConfig(**vars(architecture))
    masked = masked_tokens(config.tokens, options.mask_ratio)
    torch.manual_seed(0)
    latents = torch.randn(options.batch, config.latent_channels, config.latent_size, config.latent_size, device=device)
    labels = torch.arange(options.batch, device=device) % config.classes
    ours = OurModel(config, device, options)
    release = ReleasedModel(options.release, config, device, LEARNING_RATE, options.diffusion_steps) if options.release else None
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    known = of_device(device_name)
    steps = {"ar_steps": options.ar_steps, "diffusion_steps": options.diffusion_steps}
    work: dict[str, dict[str, Any]] = {"train": {"masked": masked}, "generate": {**steps, "guidance": options.guidance}}
    fast = fast_modes(options)
    tflops = {
        "train": training_flops(config, options.batch, masked) / 1e12,
        "generate": generation_flops(config, options.batch, generation_options(options)) / 1e12,
        "fast": generation_flops(config, options.batch, generation_options(options, **fast)) / 1e12,
    }
    measured = {name: measured_peak(device, name) for name in ("float32", "bf16") if device.type == "cpu" or name == "float32"}
    rows: list[dict[str, Any]] = []
    drawn: dict[str, Tensor] = {}
    for what in ("train", "generate") if options.what == "both" else (options.what,):
        takes_turns = contestants(what, options, ours, release, latents, labels, masked, drawn)
        for name, found in by_turns(takes_turns, device, options.warmup, options.runs).items():
            code, precision = name.split()
            seconds = statistics.median(found["seconds"])
            peak = options.peak_tflops or (known.tflops if known and precision != "float32" else None) or measured.get(precision)
            tflop = tflops[code if code == "fast" else what]
            row = {
                "benchmark": "model", "what": what, "code": code, "precision": precision, "preset": options.preset,
                "denoiser": f"{config.denoiser_depth}/{config.denoiser_width}", "device": device_name,
                "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": options.batch, **work[what],
                "compile": options.compile, "recompute": options.recompute, "graph": options.graph,
                "fast": fast if code == "fast" else {},
                "seconds": seconds, "runs": [round(one, 4) for one in found["seconds"]], "images_per_second": options.batch / seconds,
                "tflop": tflop, "tflops": tflop / seconds, "peak_tflops": peak,
                "mfu": None if peak is None else tflop / seconds / peak, "peak_memory_gib": found["peak_memory_gib"],
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    if len(options.precision) == 2:
        print(json.dumps({"benchmark": "model", "deviation_of_bf16": ours.deviation(latents, labels, masked, drawn)}))
    print_table(rows)


if __name__ == "__main__":
    main()
