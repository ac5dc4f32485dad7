"""Images a second of the bare training step (forward, backward, clip, AdamW, average) on one thread, float32 beside bf16.

    python -m benchmarks.training_step [--preset demo] [--batch 64] [--runs 5]

No Ray, no loader: what a worker's core can do at best. Medians of alternating runs.
"""

import argparse
import json
import statistics
import time

import torch

from jobs.config import load
from mar_model import MAR, MARConfig
from mar_model.ema import WeightAverage
from mar_model.masking import masked_tokens
from mar_model.recipe import initial_weights, micro_batch_draws, parameter_groups
from pipelines.precision import autocast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = load(options.preset, None, [])
    architecture = {name: getattr(run.model, name) for name in type(run.model).__dataclass_fields__}
    stride = run.tokenizer.stride
    config = MARConfig(**architecture, latent_size=run.images.size // stride, latent_channels=run.tokenizer.channels)
    torch.manual_seed(initial_weights(0))
    model = MAR(config).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-4, fused=True)
    average = WeightAverage(model, 0.999, warmup=True)
    latents = torch.randn(options.batch, config.latent_channels, config.latent_size, config.latent_size)
    labels = torch.arange(options.batch) % config.classes
    masked = masked_tokens(config.tokens, 0.867)
    device = torch.device("cpu")

    def step(number: int, precision: str) -> float:
        began = time.perf_counter()
        draws, _ = micro_batch_draws(config, options.batch, masked, seed=0, images_seen=number * options.batch, micro_batch=0)
        with autocast(precision, device):
            loss, _ = model(latents, labels, masked, draws)
        loss.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(model, number)
        return options.batch / (time.perf_counter() - began)

    speeds: dict[str, list[float]] = {"float32": [], "bf16": []}
    for number in range(2 + options.runs):
        for precision, values in speeds.items():
            values.append(step(number, precision))
    medians = {precision: statistics.median(values[2:]) for precision, values in speeds.items()}
    parameters = sum(one.numel() for one in model.parameters())
    print(json.dumps({"benchmark": "training_step", "preset": options.preset, "batch": options.batch, "parameters": parameters, **medians}))
    print(f"{'precision':<10} {'images/s':>10} {'ratio':>7}")
    for precision, value in medians.items():
        print(f"{precision:<10} {value:>10,.1f} {value / medians['float32']:>7.2f}")


if __name__ == "__main__":
    main()
