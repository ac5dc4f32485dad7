"""Quantities of a golden record of an autoencoder: of MAR's KL-16, and of LDM's first stages (`kind` is `first_stage`).

The weights of a first-stage record are the formula's, except for the tensors that the record holds. Where the two nearest codes of a
latent are closer than NEAR_TIE in squared distance, either is right: the recorded one is then taken.

The formula's weights have a low rank: sums over channels nearly cancel, and the rounding of float32 is amplified to 1e-4 to 1e-3 of the
result, by whichever kernel a processor's convolutions use. Against a computation in float64 the recorded decodings are off by up to
1.04e-4 themselves. The quantities are therefore computed with the release's order of operations (`release_arithmetic`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mar_model.checkpoints.first_stages import released_network_config
from mar_model.tokenizers import KLAutoencoder, KLConfig, VQAutoencoder, VQConfig, layers, network, without_weights
from mar_model.tokenizers.quantizer import quantizer_loss

UP_TO_LOSS = 1e-4
EXACT = 0.0
NEAR_TIE = 1e-4
PUBLISHED = {
    "ldm_vq16": VQConfig(level_attention="both"),
    "ldm_kl16": KLConfig(level_attention="both"),
    "ldm_kl8": KLConfig(channels=4, multipliers=(1, 2, 4, 4), level_attention="none"),
}
Computations = dict[str, tuple[Callable[[], Tensor], float]]


class Record(Protocol):
    """What is used of `benchmarks.parity.Record`."""

    arguments: dict[str, str]
    weights: dict[str, tuple[int, ...]]

    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def fill(self, model: torch.nn.Module, formula: bool = False) -> set[str]: ...


def is_first_stage(record: Any) -> bool:
    """Whether the record is of an autoencoder."""
    of_mar = record.weights.keys() >= {"z_proj.weight"}
    return record.arguments.get("kind") == "first_stage" or (not of_mar and "image" in record) or (not of_mar and "latent" in record)


def first_stage_config(record: Record) -> KLConfig | VQConfig:
    """By the record's `model`; without one, by the shapes of its weights. Raises ValueError for an unknown `model`."""
    name = record.arguments.get("model")
    if name is None:
        return released_network_config(record.weights)
    if name not in PUBLISHED:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def first_stage(record: Record) -> Computations:
    """What can be checked of an autoencoder's record. Raises ValueError for arguments that do not describe a network, and what
    `record.fill` raises."""
    model = without_weights(first_stage_config(record))
    absent = record.fill(model, formula=record.arguments.get("kind") == "first_stage")
    if absent:
        record["model." + min(absent)]  # raises: the record lacks it
    return VQQuantities(record, model).computations() if isinstance(model, VQAutoencoder) else _of_kl(record, model)


def release_arithmetic() -> AbstractContextManager[Any]:
    """While it is entered, our modules compute in float32 as LDM's code does, step by step: swish as x·sigmoid(x), attention as two matrix
    products around a softmax; the sums of the convolutions alone are accumulated in float64."""
    stack = ExitStack()
    for module in (layers, network):
        stack.enter_context(patch.object(module, "silu", lambda x: x * torch.sigmoid(x)))
    stack.enter_context(patch.object(layers.AttentionBlock, "forward", _attention))
    stack.enter_context(patch.object(nn.Conv2d, "_conv_forward", _convolution))
    return stack


def _attention(self: layers.AttentionBlock, x: Tensor) -> Tensor:
    h = self.norm(x)
    q, k, v = (project(h).flatten(2) for project in (self.q, self.k, self.v))  # (B, W, h·w)
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5, dim=2)
    return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(x.shape))


def _convolution(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x.double(), weight.double(), bias.double(), self.stride, self.padding).float()


def _of_kl(record: Record, model: KLAutoencoder) -> Computations:
    """`moments` of `image`, and `decoded` of `latent`."""
    return {
        "moments": (lambda: model.encode(record["image"]), UP_TO_LOSS),
        "decoded": (lambda: model.decode(record["latent"]), UP_TO_LOSS),
    }


class VQQuantities:
    """The chain `image` → `latent` → `indices` → `quantized` → `decoded`, each from the step before it; where the image is not
    recorded, from the first of them that is."""

    def __init__(self, record: Record, model: VQAutoencoder) -> None:
        self.record, self.model = record, model

    def computations(self) -> Computations:
        return {
            "latent": (lambda: self.model.latents(self.record["image"]), UP_TO_LOSS),
            "indices": (lambda: self.indices, EXACT),
            "quantized": (lambda: self.model.codes(self.indices), UP_TO_LOSS),
            "quantizer_loss": (lambda: quantizer_loss(self.latents, self.model.codes(self.indices)), UP_TO_LOSS),
            "decoded": (lambda: self.model.decode_codes(self.quantized), UP_TO_LOSS),
        }

    @cached_property
    def latents(self) -> Tensor:
        return self.model.latents(self.record["image"]) if "image" in self.record else self.record["latent"]

    @cached_property
    def indices(self) -> Tensor:
        """(B, h, w) int64."""
        if "image" not in self.record and "latent" not in self.record:
            return self.record["indices"].long()
        found = self.model.quantize(self.latents).indices
        if "indices" not in self.record:
            return found
        recorded = self.record["indices"].long()
        if recorded.shape != found.shape:
            return found
        return torch.where(self._nearly_as_near(recorded), recorded, found)

    def _nearly_as_near(self, indices: Tensor) -> Tensor:
        """Where these codes are farther than the nearest ones by less than NEAR_TIE, (B, h, w) bool."""
        book = self.model.quantize.embedding.weight.double()
        vectors = self.latents.double().permute(0, 2, 3, 1)  # (B, h, w, C)
        known = indices.clamp(0, len(book) - 1)
        here = (vectors - book[known]).square().sum(dim=-1)
        nearest = (vectors - book[self.model.quantize(self.latents).indices]).square().sum(dim=-1)
        return (here - nearest < NEAR_TIE) & (known == indices)

    @property
    def quantized(self) -> Tensor:
        if any(name in self.record for name in ("image", "latent", "indices")):
            return self.model.codes(self.indices)
        return self.record["quantized"]
