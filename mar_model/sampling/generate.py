"""Generation: tokens in random order, several per step, each drawn by the denoiser (arXiv 2406.11838, sections 3.3 and 3.4)."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mar_model.mar import MAR, check_classes
from mar_model.masking import filled_first, mask_schedule
from mar_model.noise import Noise, to_device
from mar_model.sampling.feature_reuse import FeatureReuse
from mar_model.sampling.options import PUBLISHED, Completion, GenerationOptions
from mar_model.sampling.token_sampler import TokenSampler


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor | None,
    noise: Noise,
    options: GenerationOptions = PUBLISHED,
    *,
    orders: Tensor | None = None,
    completion: Completion | None = None,
    token_sampler: TokenSampler | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw normalized latents (B, C, H, W) float32 for `labels` (B,), with all random numbers from `noise`.

    labels: None draws unconditionally, one image per order of `noise`.
    orders: generation orders (B, L), one permutation per row, instead of those of `noise`.
    completion: draw only the tokens to fill. The schedule of AR steps covers these tokens; filling all tokens is plain generation.
    token_sampler: a sampler to reuse between calls, for captured graphs and weights in bf16.
    after_step(i, latents): called with the latents after AR step i, zero where nothing is drawn yet.

    Raises ValueError before any work for invalid arguments, with the argument, the value found and the value expected.
    """
    config, device = model.config, model.fake_latent.device
    sampling, steps = options.sampling, options.steps
    orders = _checked_orders(noise.orders(config.tokens) if orders is None else orders, config.tokens)
    batch = orders.shape[0]
    _check_labels(labels, batch, config.classes)
    if labels is None and options.guidance != 1.0:
        raise ValueError(f"guidance is {options.guidance} without labels, expected 1: guidance needs a class")
    _check_range(options.x0_range, config.latent_channels)

    tokens = torch.zeros(batch, config.tokens, config.token_dim, device=device)
    to_draw = config.tokens
    if completion is not None:
        fill = _checked_fill(completion, model, batch)
        tokens = model.patchify(completion.known.to(device)).masked_fill(to_device(fill, device)[:, :, None], 0.0)
        orders, to_draw = filled_first(orders, fill)
    lengths = mask_schedule(to_draw, options.ar_steps)
    draw = TokenSampler(model.diffloss.net) if token_sampler is None else token_sampler
    schedules = [draw.schedule(count, device) for count in set(steps)]
    guided = options.guidance != 1.0 and any(sampling.guides(timestep) for schedule in schedules for timestep in schedule.visited)
    embedding = _embedding(model, labels, batch, guided)
    reuse = FeatureReuse(model, embedding, batch, options.ar_steps, options.reuse_steps) if options.reuse_steps else None
    token_range = None
    if options.x0_range is not None:
        low, high = (bound.to(device, torch.float32).repeat_interleave(config.patch_size**2) for bound in options.x0_range)
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
            step_noise = noise.tokens(step, predicted, options.diffusion_steps, config.token_dim)[: 1 + steps[step]]
            scale = options.scale(max(after, 1), config.tokens) if guided else None
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


def _check_range(x0_range: tuple[Tensor, Tensor] | None, channels: int) -> None:
    if x0_range is None:
        return
    shapes = [tuple(bound.shape) for bound in x0_range]
    if shapes != [(channels,), (channels,)]:
        raise ValueError(f"x0_range has shapes {shapes}, expected two of ({channels},)")
    if not bool((x0_range[0] <= x0_range[1]).all()):  # false for NaN
        raise ValueError(f"x0_range ranges from {x0_range[0].tolist()} to {x0_range[1].tolist()}, expected low ≤ high in every channel")


def _checked_fill(completion: Completion, model: MAR, batch: int) -> Tensor:
    """`fill` on the CPU, (B, L). Raises ValueError for tensors that make no completion of `batch` images."""
    config, known, fill = model.config, completion.known, completion.fill
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
