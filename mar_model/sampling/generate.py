"""Generation: tokens in random order, several per step, each drawn by the denoiser (arXiv 2406.11838, sections 3.3 and 3.4)."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mar_model.head.diffusion import annealed_steps, respaced_timesteps
from mar_model.mar import MAR, check_classes
from mar_model.masking import filled_first, mask_schedule
from mar_model.noise import Noise, to_device
from mar_model.sampling.feature_reuse import FeatureReuse
from mar_model.sampling.token_sampler import Sampling, TokenSampler, sample_tokens

__all__ = ["SCHEDULES", "generate", "sample_tokens"]

SCHEDULES = ("linear", "constant")


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor | None,
    noise: Noise,
    *,
    ar_steps: int = 64,
    diffusion_steps: int = 100,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    temperature: float = 1.0,
    sampler: str = "ancestral",
    eta: float = 0.0,
    x0_range: tuple[Tensor, Tensor] | None = None,
    orders: Tensor | None = None,
    known: Tensor | None = None,
    fill: Tensor | None = None,
    diffusion_steps_end: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    reuse_steps: int = 0,
    token_sampler: TokenSampler | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw normalised latents (B, C, H, W) float32 for `labels` (B,), with all random numbers from `noise`.

    labels: None draws unconditionally, one image per order of `noise`.
    guidance: scale s of classifier-free guidance, noise = uncond + s·(cond − uncond). With the schedule *linear* it grows from 1 to s
        as the image fills.
    sampler: *ancestral*, as published, or *ddim* with its `eta` (`Diffusion.ddim_step`).
    x0_range: bounds per channel, two (C,) tensors in normalised units, to which predicted clean tokens are clamped (None: as published).
    orders: generation orders (B, L), one permutation per row, instead of those of `noise`.
    known, fill: completion. Of the latents `known` (B, C, H, W) float32, the tokens where `fill`, (B, L) or (B, h, w) bool, is true are
        drawn, equally many per image; all others are known from the start and returned bit for bit. The schedule of AR steps covers the
        tokens to fill; filling all tokens is plain generation.
    after_step(i, latents): called with the latents after AR step i, zero where nothing is drawn yet.
    token_sampler: a sampler to reuse between calls, for captured graphs and weights in bf16.

    Fast modes: with `diffusion_steps_end` the diffusion steps decrease linearly over the AR steps (`annealed_steps`), and each token uses
    the first entries of its noise. `guidance_interval` guides only in a part of the noise schedule (`Sampling`). After each complete
    AR step, `reuse_steps` AR steps reuse features (`FeatureReuse`).

    Raises ValueError before any work for invalid arguments, with the argument, the value found and the value expected.
    """
    config, device = model.config, model.fake_latent.device
    sampling = Sampling(sampler, eta, temperature, guidance_interval)
    orders = _checked_orders(noise.orders(config.tokens) if orders is None else orders, config.tokens)
    batch = orders.shape[0]
    _check_labels(labels, batch, config.classes)
    _check_guidance(guidance, guidance_schedule, labels)
    _check_range(x0_range, config.latent_channels)
    fill = _checked_fill(known, fill, model, batch)
    if reuse_steps < 0:
        raise ValueError(f"reuse_steps is {reuse_steps}, expected 0 or more")
    respaced_timesteps(diffusion_steps)  # raises for an invalid number of steps
    steps = annealed_steps(diffusion_steps, diffusion_steps if diffusion_steps_end is None else diffusion_steps_end, ar_steps)

    tokens = torch.zeros(batch, config.tokens, config.token_dim, device=device)
    to_draw = config.tokens
    if known is not None and fill is not None:
        tokens = model.patchify(known.to(device)).masked_fill(to_device(fill, device)[:, :, None], 0.0)
        orders, to_draw = filled_first(orders, fill)
    lengths = mask_schedule(to_draw, ar_steps)
    draw = TokenSampler(model.diffloss.net) if token_sampler is None else token_sampler
    schedules = [draw.schedule(count, device) for count in set(steps)]
    guided = guidance != 1.0 and any(sampling.guides(timestep) for schedule in schedules for timestep in schedule.visited)
    embedding = _embedding(model, labels, batch, guided)
    reuse = FeatureReuse(model, embedding, batch, ar_steps, reuse_steps) if reuse_steps else None
    token_range = None
    if x0_range is not None:
        low, high = (bound.to(device, torch.float32).repeat_interleave(config.patch_size**2) for bound in x0_range)
        token_range = (low, high)
    orders_on_device = to_device(orders, device)

    with _evaluating(model):
        for step, (before, after) in enumerate(itertools.pairwise(lengths)):
            if before == after:  # more steps than tokens: this step draws nothing
                continue
            kept = orders_on_device[:, before:].sort(dim=1).values
            positions = orders_on_device[:, after:before].sort(dim=1).values
            if reuse is None:
                z = _conditions(model, tokens, kept, positions, embedding)
            else:
                z = reuse.conditions(step, tokens, kept, positions)
            predicted = torch.zeros(batch, config.tokens, dtype=torch.bool).scatter_(1, orders[:, after:before], True)
            step_noise = noise.tokens(step, predicted, diffusion_steps, config.token_dim)[: 1 + steps[step]]
            scale = _scale(guidance, guidance_schedule, max(after, 1), config.tokens) if guided else None
            drawn = draw(z.flatten(0, 1), to_device(step_noise, device), sampling, scale, token_range)
            tokens.scatter_(1, positions[:, :, None].expand(-1, -1, config.token_dim), drawn.view(batch, -1, config.token_dim))
            if after_step is not None:
                after_step(step, model.unpatchify(tokens).clone())
    return model.unpatchify(tokens)


@contextmanager
def _evaluating(model: MAR) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _embedding(model: MAR, labels: Tensor | None, batch: int, unconditional_half: bool) -> Tensor:
    """Class embeddings (B, W), or (2B, W) with the unconditional half last."""
    device = model.fake_latent.device
    dropped = torch.full((batch,), labels is None, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if labels is None else labels.to(device)
    conditional = model.class_embedding(labels, dropped)
    return torch.cat([conditional, model.class_embedding(labels, ~dropped)]) if unconditional_half else conditional


def _conditions(model: MAR, tokens: Tensor, kept: Tensor, positions: Tensor, embedding: Tensor) -> Tensor:
    """z at `positions` (B, M), given the known tokens (B, L, D) at `kept` (B, K): (B, M, W), or (2B, M, W) for 2B embeddings."""
    copies = embedding.shape[0] // tokens.shape[0]
    kept, positions = kept.repeat(copies, 1), positions.repeat(copies, 1)
    return model.decode(model.encode(tokens.repeat(copies, 1, 1), kept, embedding), kept, positions)


def _scale(guidance: float, schedule: str, masked: int, tokens: int) -> float:
    """The guidance scale of a step that leaves `masked` tokens masked (the last step counts as leaving one)."""
    return guidance if schedule == "constant" else 1 + (guidance - 1) * (tokens - masked) / tokens


def _checked_orders(orders: Tensor, tokens: int) -> Tensor:
    """The orders on the CPU, int64. Raises ValueError if they are not permutations."""
    if orders.ndim != 2 or orders.shape[1] != tokens or orders.is_floating_point() or orders.dtype == torch.bool:
        raise ValueError(f"orders have shape {tuple(orders.shape)} and dtype {orders.dtype}, expected (B, {tokens}) integers")
    orders = orders.to("cpu", torch.long)
    wrong = (orders.sort(dim=1).values != torch.arange(tokens)).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"orders {wrong[:5]} are not permutations of 0 to {tokens - 1}")
    return orders


def _check_labels(labels: Tensor | None, batch: int, classes: int) -> None:
    if labels is None:
        return
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, expected (B,) integers")
    if labels.shape[0] != batch:
        raise ValueError(f"labels are for {labels.shape[0]} images, the orders for {batch}")
    check_classes(labels, classes)


def _check_guidance(guidance: float, schedule: str, labels: Tensor | None) -> None:
    if not math.isfinite(guidance):
        raise ValueError(f"guidance is {guidance}, expected a finite number")
    if labels is None and guidance != 1.0:
        raise ValueError(f"guidance is {guidance} without labels, expected 1: guidance needs a class")
    if schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")


def _check_range(x0_range: tuple[Tensor, Tensor] | None, channels: int) -> None:
    if x0_range is None:
        return
    shapes = [tuple(bound.shape) for bound in x0_range]
    if shapes != [(channels,), (channels,)]:
        raise ValueError(f"x0_range has shapes {shapes}, expected two of ({channels},)")
    if not bool((x0_range[0] <= x0_range[1]).all()):  # false for NaN
        raise ValueError(f"x0_range ranges from {x0_range[0].tolist()} to {x0_range[1].tolist()}, expected low ≤ high in every channel")


def _checked_fill(known: Tensor | None, fill: Tensor | None, model: MAR, batch: int) -> Tensor | None:
    """`fill` on the CPU, (B, L), or None without a completion. Raises ValueError for an invalid `known` or `fill`."""
    config = model.config
    if known is None and fill is None:
        return None
    if known is None or fill is None:
        raise ValueError(f"{'known' if known is None else 'fill'} is missing: a completion needs both")
    shape = (batch, config.latent_channels, config.latent_size, config.latent_size)
    if tuple(known.shape) != shape or known.dtype != torch.float32:
        raise ValueError(f"known has shape {tuple(known.shape)} and dtype {known.dtype}, expected {shape} and torch.float32")
    broken = int((~known.isfinite()).sum())
    if broken:
        raise ValueError(f"known contains {broken} values that are NaN or infinite, expected none")
    side = config.latent_size // config.patch_size
    if tuple(fill.shape) not in ((batch, config.tokens), (batch, side, side)) or fill.dtype != torch.bool:
        expected = f"({batch}, {config.tokens}) or ({batch}, {side}, {side}) and torch.bool"
        raise ValueError(f"fill has shape {tuple(fill.shape)} and dtype {fill.dtype}, expected {expected}")
    fill = fill.flatten(1).cpu()
    counts = fill.sum(dim=1)
    if batch and int(counts.min()) != int(counts.max()):
        found = f"between {int(counts.min())} and {int(counts.max())} tokens to fill"
        raise ValueError(f"fill leaves {found}, expected equally many in every image; draw the others in separate batches")
    if batch and int(counts[0]) == 0:
        raise ValueError("fill selects no token, expected at least one")
    return fill
