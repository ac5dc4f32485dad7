"""The number of masked tokens: a random ratio in training, a cosine schedule in generation (arXiv 2406.11838, section 3.4)."""

import math

import torch
from torch import Tensor


def draw_mask_ratio(generator: torch.Generator, mean: float = 1.0, std: float = 0.25, minimum: float = 0.7) -> float:
    """One mask ratio from normal(mean, std) truncated to [minimum, 1], by inversion of its distribution function."""
    low = torch.special.ndtr(torch.tensor((minimum - mean) / std, dtype=torch.float64))
    high = torch.special.ndtr(torch.tensor((1.0 - mean) / std, dtype=torch.float64))
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    ratio = mean + std * float(torch.special.ndtri(low + (high - low) * uniform))
    return min(max(ratio, minimum), 1.0)


def mean_mask_ratio(mean: float = 1.0, std: float = 0.25, minimum: float = 0.7) -> float:
    """The mean of `draw_mask_ratio`; 0.867 for the published values."""
    low, high = (minimum - mean) / std, (1.0 - mean) / std
    density = math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)
    share = math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))
    return mean + std * density * math.sqrt(2 / math.pi) / share


def masked_tokens(tokens: int, ratio: float) -> int:
    """Masked tokens of an image of `tokens` tokens: ceil(tokens · ratio)."""
    return min(tokens, math.ceil(tokens * ratio))


def mask_schedule(tokens: int, steps: int) -> list[int]:
    """The number of masked tokens before step 0 and after each step: steps + 1 values from `tokens` down to 0.

    After step i it is max(1, min(previous − 1, floor(tokens · cos(π/2 · (i+1)/steps)))); the last step predicts all remaining tokens.
    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"ar_steps is {steps}, expected 1 or more")
    lengths = [tokens]
    for i in range(steps - 1):
        cosine = math.floor(tokens * math.cos(math.pi / 2 * (i + 1) / steps))
        lengths.append(max(1, min(lengths[-1] - 1, cosine)))
    return [*lengths, 0]


def filled_first(orders: Tensor, fill: Tensor) -> tuple[Tensor, int]:
    """Generation orders (B, L) with the tokens in `fill` (B, L) moved to the front, and the number of these tokens per image."""
    known = ~fill.gather(1, orders)
    return orders.gather(1, known.to(torch.uint8).argsort(dim=1, stable=True)), int(fill[0].sum())
