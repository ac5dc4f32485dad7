"""Compares this implementation with golden records of the published release in float32: the error of every recorded quantity.

    python -m benchmarks.parity FILE... [--json] [--device cpu]

A record is a safetensors file with inputs and outputs of the release's model, its arguments in the metadata, and its weights or the
phase of the formula that generates them. Each recorded quantity is computed from the earliest recorded inputs. Error: largest absolute
error over the largest magnitude of the quantity. Bound: 1e-4 up to the loss, 1e-3 for sampled values, 0 for code indices.
A record of metrics (`kind=metrics` in its metadata) has features, logits and expected values; bounds: benchmarks/parity_metrics.py.
Exit status: 0; 1 if an error exceeds its bound or is not finite; 2 if a file is not a record.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from benchmarks.parity_first_stages import first_stage, is_first_stage, release_arithmetic
from mar_model import GenerationOptions, TrainingDraws, generate
from mar_model.checkpoints.checkpoint import model_without_weights
from mar_model.checkpoints.released_sizes import released_config
from mar_model.files import describe_misfit, shapes_of
from mar_model.head.diffusion import Diffusion, TokenLoss, respaced_timesteps
from mar_model.masking import masked_tokens
from mar_model.sampling.token_sampler import sample_tokens

UP_TO_LOSS, SAMPLED = 1e-4, 1e-3
WEIGHTS = "model."


class NoRecord(Exception):
    """The file is not a golden record, or is damaged."""


class Missing(Exception):
    """A quantity is recorded, but not its input; the text is the input's name."""


class Row(NamedTuple):
    """One quantity of a record. `error` is None if it could not be checked; `remark` gives the reason, or how the check failed."""

    quantity: str
    shape: list[int]
    error: float | None
    bound: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        return self.error is None or self.error <= self.bound  # false for NaN


class Record:
    """Arguments and tensors of a golden record; a tensor is read on access."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        try:
            self.file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise NoRecord(f"{path} is no golden record: {str(error).splitlines()[0]}") from error
        self.arguments: dict[str, str] = self.file.metadata() or {}
        self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
        self.weights = {name.removeprefix(WEIGHTS): shape for name, shape in self.shapes.items() if name.startswith(WEIGHTS)}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise Missing(name)
        return self.file.get_tensor(name).to(self.device)

    def number(self, name: str, default: float | None = None) -> float:
        """A number in the metadata."""
        text = self.arguments.get(name, default)
        if text is None:
            raise Missing(f"{name} in the metadata")
        try:
            return float(text)
        except ValueError as error:
            raise NoRecord(f"{self.path} has {name}={text!r} in its metadata, expected a number") from error

    def fill(self, model: nn.Module, formula: bool = False) -> set[str]:
        """Set the weights of `model` (on the meta device) from the record or the formula (with `formula` all that are not recorded).
        Returns the names of missing weights."""
        own = shapes_of(model.state_dict())
        values = {}
        if formula or not self.weights:
            phase = self.number("phase")
            values = {name: formula_fill(name, shape, phase).to(self.device) for name, shape in own.items() if name not in self.weights}
        if self.weights:
            misfit = describe_misfit({name: own[name] for name in own.keys() & self.weights.keys()}, self.weights)
            if misfit:
                raise NoRecord(f"{self.path} has weights that don't fit its arguments: {misfit}")
            values |= {name: self[WEIGHTS + name].float() for name in self.weights}
        model.load_state_dict(values, strict=False, assign=True)
        model.eval().requires_grad_(False)
        return set(own) - set(values)


def formula_fill(name: str, shape: tuple[int, ...], phase: float) -> Tensor:
    """Weights of a formula record: a function of a tensor's released name and shape alone, computed in float64."""
    values = torch.arange(math.prod(shape), dtype=torch.float64)
    values.mul_(0.7).add_(zlib.crc32(name.encode()) % 1009 + phase).sin_()
    if len(shape) >= 2:
        values.mul_(math.sqrt(2 * shape[0] / values.numel()))
    elif name.endswith(".weight"):
        values.mul_(0.1).add_(1)
    else:
        values.mul_(0.02)
    return values.float().reshape(shape)


class MARQuantities:
    """The quantities of a MAR record. If an input is not recorded, the recorded result of the previous step replaces it."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.config = released_config(record.weights, record.arguments)
        self.model = model_without_weights(self.config)
        self.absent = record.fill(self.model)
        self.model.diffloss.diffusion.to(record.device)

    def computations(self) -> dict[str, tuple[Callable[[], Tensor], float]]:
        return {
            "gen_timestep_map": (lambda: torch.tensor(respaced_timesteps(self.diffusion_steps())), UP_TO_LOSS),
            "train.tokens": (lambda: self.model.patchify(self.record["train.latents"].float()), UP_TO_LOSS),
            "train.encoded": (self.encode, UP_TO_LOSS),
            "train.z": (self.decode, UP_TO_LOSS),
            "loss.mse": (lambda: self.loss.mse, UP_TO_LOSS),
            "loss.vb": (lambda: self.loss.bound, UP_TO_LOSS),
            "loss.per_token": (lambda: self.loss.total, UP_TO_LOSS),
            "loss.scalar": (self.scalar_loss, UP_TO_LOSS),
            "head.sample": (self.head_sample, SAMPLED),
            "generate.latents": (self.generated, SAMPLED),
        }

    def need(self, *prefixes: str) -> None:
        """Raises Missing for a weight of these modules that is not in the record."""
        absent = sorted(name for name in self.absent if name.startswith(prefixes))
        if absent:
            raise Missing(WEIGHTS + absent[0])

    @cached_property
    def mask(self) -> Tensor:
        """(B, L) bool; if it is not recorded, the first tokens of the orders by the recorded ratio."""
        if "train.mask" in self.record:
            mask = self.record["train.mask"].bool()
        else:
            orders = self.record["train.orders"].long()
            masked = masked_tokens(orders.shape[1], self.record.number("mask_ratio"))
            mask = torch.zeros_like(orders, dtype=torch.bool).scatter(1, orders[:, :masked], True)
        if len(mask.sum(dim=1).unique()) > 1:
            raise ValueError("train.mask masks different numbers of tokens, expected equal numbers in all images")
        return mask

    @cached_property
    def kept(self) -> Tensor:
        """Positions of the unmasked tokens, (B, K) ascending."""
        return (~self.mask).nonzero()[:, 1].view(self.mask.shape[0], -1)

    @cached_property
    def tokens(self) -> Tensor:
        latents = "train.latents" in self.record or "train.tokens" not in self.record
        return self.model.patchify(self.record["train.latents"]) if latents else self.record["train.tokens"]

    def encode(self) -> Tensor:
        self.need("class_emb", "z_proj", "encoder")
        labels = self.record["train.labels"].long()
        embedding = self.model.class_embedding(labels, torch.zeros_like(labels, dtype=torch.bool))
        return self.model.encode(self.tokens, self.kept, embedding)

    def decode(self) -> Tensor:
        self.need("decoder", "mask_token", "diffusion_pos_embed_learned")
        return self.model.decode(self.own_or_recorded(self.encode, "train.encoded"), self.kept)

    @cached_property
    def z(self) -> Tensor:
        return self.own_or_recorded(self.decode, "train.z")

    def own_or_recorded(self, compute: Callable[[], Tensor], name: str) -> Tensor:
        try:
            return compute()
        except Missing:
            if name not in self.record:
                raise
            return self.record[name]

    @cached_property
    def loss(self) -> TokenLoss:
        """Losses of all tokens, (B·L) each."""
        self.need("diffloss")
        t, noise = self.record["loss.t"].long(), self.record["loss.noise"]
        return self.model.diffloss(self.tokens.flatten(0, 1), self.z.flatten(0, 1), t, noise)

    def scalar_loss(self) -> Tensor:
        """The loss from the training path, which computes only masked tokens; if its inputs are not recorded, the mean over the mask."""
        masked = int(self.mask[0].sum())
        try:
            self.need("")
            batch, length = self.mask.shape
            any_order = self.mask.logical_not().long().argsort(dim=1, stable=True)  # starting with the masked tokens
            draws = TrainingDraws(
                orders=self.record["train.orders"].long() if "train.orders" in self.record else any_order,
                label_dropped=torch.zeros(batch, dtype=torch.bool, device=self.mask.device),
                timesteps=self.record["loss.t"].long().view(batch, length)[self.mask].view(1, batch, masked),
                noise=self.record["loss.noise"].view(batch, length, -1)[self.mask].view(1, batch, masked, -1),
            )
            latents = self.model.unpatchify(self.tokens)
            loss, _ = self.model(latents, self.record["train.labels"].long(), masked, draws)
            return loss.total.mean()
        except Missing:
            return self.loss.total[self.mask.flatten()].mean()

    def diffusion_steps(self) -> int:
        if "num_sampling_steps" not in self.record.arguments and "gen_timestep_map" in self.record.arguments:
            return len(json.loads(self.record.arguments["gen_timestep_map"]))
        return int(self.record.number("num_sampling_steps"))

    def head_sample(self) -> Tensor:
        """One run of the denoiser's sampler, guided if there are twice as many conditions as noises."""
        self.need("diffloss")
        z, initial = self.record["head.z"], self.record["head.initial_noise"]
        return sample_tokens(
            self.model.diffloss.net,
            Diffusion(respaced_timesteps(self.diffusion_steps())).to(z.device),
            z,
            torch.cat([initial[None], self.record["head.step_noise"]]),
            guidance=self.record.number("cfg_scale") if z.shape[0] == 2 * initial.shape[0] else None,
            temperature=self.record.number("temperature", 1.0),
        )

    def generated(self) -> Tensor:
        self.need("")
        return generate(
            self.model,
            self.record["train.labels"].long(),
            RecordedNoise(self.record),
            GenerationOptions(
                ar_steps=int(self.record.number("num_iter")),
                diffusion_steps=self.diffusion_steps(),
                guidance=self.record.number("cfg_scale", 1.0),
                guidance_schedule=self.record.arguments.get("cfg_schedule", "linear"),
                temperature=self.record.number("temperature", 1.0),
            ),
        )


class RecordedNoise:
    """Replays the draws of a recorded generation."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def orders(self, tokens: int) -> Tensor:
        return self.record["generate.orders"].long()

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        noise, expected = self.record[f"generate.noise.{step}"], (1 + diffusion_steps, int(predicted.sum()), dim)
        if noise.shape != expected:
            raise ValueError(f"generate.noise.{step} is {list(noise.shape)}, expected {list(expected)}")
        return noise


@torch.no_grad()
def rows(record: Record) -> Iterator[Row]:
    """All recorded quantities with their errors. Raises NoRecord if the file has none, or no weights."""
    if record.arguments.get("kind") == "metrics":
        yield from metric_rows(record)
        return
    of_tokenizer = is_first_stage(record)
    try:
        computations = first_stage(record) if of_tokenizer else MARQuantities(record).computations()
    except ValueError as error:
        raise NoRecord(f"{record.path} has arguments of an invalid model: {error}") from error
    except Missing as missing:
        raise NoRecord(f"{record.path} is no golden record: it holds no weights and no {missing}") from missing
    checked = 0
    for name, (compute, bound) in computations.items():
        if name in record:
            expected = record[name]
        elif name in record.arguments:
            expected = torch.tensor(json.loads(record.arguments[name]))
        else:
            continue
        shape = list(expected.shape)
        try:
            with release_arithmetic() if of_tokenizer else nullcontext():
                found = compute()
        except Missing as missing:
            yield Row(name, shape, None, bound, f"not checked: the record has no {missing}")
            continue
        except (ValueError, RuntimeError, IndexError) as error:
            yield Row(name, shape, math.inf, bound, " ".join(str(error).split())[:200])
        else:
            remark = "" if found.shape == expected.shape else f"ours is {list(found.shape)}"
            yield Row(name, shape, math.inf if remark else relative_error(found, expected), bound, remark)
        checked += 1
    if not checked:
        raise NoRecord(f"{record.path} is no golden record: it holds no quantity with what it is computed from")


def metric_rows(record: Record) -> Iterator[Row]:
    """The rows of a record of metrics. Raises NoRecord if its metadata are incomplete, or its arrays are not features."""
    from benchmarks.parity_metrics import ARRAYS, NUMBERS, metric_errors  # imports pipelines, which a machine with a GPU may lack

    arrays = {name: record[name].cpu().numpy() for name in ARRAYS if name in record}
    try:
        numbers = {name: int(record.number(name)) for name in NUMBERS}
        expected = {name: float(value) for name, value in json.loads(record.arguments["expected"]).items()}
        found = list(metric_errors(arrays, numbers, expected))
    except Missing as missing:
        raise NoRecord(f"{record.path} is no record of metrics: it has no {missing}") from missing
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise NoRecord(f"{record.path} is no record of metrics: {error}") from error
    for name, error, bound in found:
        remark = "" if error is not None else "not checked: the record lacks its arrays" if bound else "not checked: no metric of this name"
        yield Row(name, [], error, bound, remark)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest magnitude of what is expected, which may be zero only if the error is zero."""
    error = float((found.double() - expected.double().to(found.device)).abs().max()) if expected.numel() else 0.0
    largest = float(expected.double().abs().max()) if expected.numel() else 0.0
    return 0.0 if error == 0 else error / largest if largest else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="also a JSON line for each quantity")
    parser.add_argument("--device", default="cpu", help="device of this implementation (default: cpu)")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # no TF32
    status = 0
    for path in options.files:
        print(f"{path.name}\n  {'quantity':<18} {'shape':<20} {'error':>9} {'bound':>7}")
        try:
            for row in rows(Record(path, torch.device(options.device))):
                error = "–" if row.error is None else f"{row.error:.2e}"
                verdict = row.remark if row.passed else f"OVER THE BOUND {row.remark}"
                print(
                    f"  {row.quantity:<18} {'×'.join(map(str, row.shape)) or 'scalar':<20} {error:>9} {row.bound:>7.0e}  {verdict}".rstrip()
                )
                if options.json:
                    finite = row.error is not None and math.isfinite(row.error)
                    values = {**row._asdict(), "error": row.error if finite else None, "passed": row.passed}
                    print(json.dumps({"benchmark": "parity", "record": path.name, **values}))
                status = max(status, 0 if row.passed else 1)
        except NoRecord as error:
            print(error, file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
