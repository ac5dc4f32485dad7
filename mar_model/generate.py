"""Generation: tokens in random order, many at a time, each one drawn by the denoiser (arXiv 2406.11838, sections 3.3 and 3.4)."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mar_model.denoiser import Denoiser
from mar_model.diffusion import Diffusion, respaced_timesteps
from mar_model.mar import MAR
from mar_model.masking import mask_schedule
from mar_model.noise import Noise

SCHEDULES = ("linear", "constant")


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor,
    noise: Noise,
    *,
    ar_steps: int = 64,
    diffusion_steps: int = 100,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    temperature: float = 1.0,
    x0_range: tuple[Tensor, Tensor] | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Normalised latents (B, C, H, W) float32 for `labels` (B,), all randomness from `noise`.

    guidance: scale s of classifier-free guidance, noise = uncond + s·(cond − uncond); *linear* lets it grow from 1 to s as the
    image fills. x0_range: per-channel bounds, two (C,) tensors in normalised units, that each predicted clean token is kept in
    (None: the published sampler). after_step(i, latents) sees the picture after AR step i.
    Raises ValueError for labels outside the classes, a negative temperature, an unknown schedule, zero steps.
    """
    config = model.config
    _check(model, labels, guidance_schedule, temperature)
    lengths = mask_schedule(config.tokens, ar_steps)
    diffusion = Diffusion(respaced_timesteps(diffusion_steps)).to(labels.device)
    token_range = None
    if x0_range is not None:
        low, high = (bound.to(labels.device, torch.float32).repeat_interleave(config.patch_size**2) for bound in x0_range)
        token_range = (low, high)
    guided = guidance != 1.0
    batch = labels.shape[0]
    orders = noise.orders(config.tokens).to(labels.device)
    tokens = torch.zeros(batch, config.tokens, config.token_dim, device=labels.device)
    dropped = torch.zeros(batch, dtype=torch.bool, device=labels.device)
    embedding = model.class_embedding(labels, dropped)
    if guided:
        embedding = torch.cat([embedding, model.class_embedding(labels, ~dropped)])

    was_training = model.training
    model.eval()
    for step, (before, after) in enumerate(itertools.pairwise(lengths)):
        if before == after:  # more steps than tokens: nothing leaves the mask
            continue
        kept = orders[:, before:].sort(dim=1).values
        positions = orders[:, after:before].sort(dim=1).values
        predicted = torch.zeros_like(orders, dtype=torch.bool).scatter_(1, positions, True)
        both = 2 if guided else 1
        z = model.decode(model.encode(tokens.repeat(both, 1, 1), kept.repeat(both, 1), embedding), kept.repeat(both, 1))
        rows = z[predicted.repeat(both, 1)]
        still_masked = max(after, 1)  # the last step counts as one masked token
        scale = guidance if guidance_schedule == "constant" else 1 + (guidance - 1) * (config.tokens - still_masked) / config.tokens
        drawn = sample_tokens(
            model.diffloss.net,
            diffusion,
            rows,
            noise.tokens(step, predicted, diffusion_steps, config.token_dim).to(labels.device),
            guidance=scale if guided else None,
            temperature=temperature,
            x0_range=token_range,
        )
        tokens[predicted] = drawn
        if after_step is not None:
            after_step(step, model.unpatchify(tokens))
    model.train(was_training)
    return model.unpatchify(tokens)


@torch.no_grad()
def sample_tokens(
    denoiser: Denoiser,
    diffusion: Diffusion,
    z: Tensor,
    noise: Tensor,
    *,
    guidance: float | None = None,
    temperature: float = 1.0,
    x0_range: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Draw one token per condition by ancestral sampling: (N, D) float32.

    z is (N, W), or (2N, W) with the unconditional half last when `guidance` is given; noise is (1 + steps, N, D), the initial
    noise first, then one entry per step from the noisiest down. State, schedule and guidance are float32 whatever autocast does.
    """
    condition = denoiser.cond_embed(z)
    times = denoiser.time_embed(diffusion.timesteps)
    x = noise[0]
    steps = diffusion.timesteps.shape[0]
    for index in reversed(range(steps)):
        state = x if guidance is None else torch.cat([x, x])
        output = denoiser.denoise(state, times[index] + condition).float()
        predicted_noise, interpolation = output.chunk(2, dim=1)
        if guidance is not None:
            conditional, unconditional = predicted_noise.chunk(2)
            predicted_noise = unconditional + guidance * (conditional - unconditional)
            interpolation = interpolation[: x.shape[0]]
        x = diffusion.step(x, index, predicted_noise, interpolation, noise[steps - index], temperature, x0_range)
    return x


def _check(model: MAR, labels: Tensor, guidance_schedule: str, temperature: float) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}, expected (B,) integers")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < model.config.classes):
        raise ValueError(f"labels go from {int(labels.min())} to {int(labels.max())}, expected 0 to {model.config.classes - 1}")
    if guidance_schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule is {guidance_schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
