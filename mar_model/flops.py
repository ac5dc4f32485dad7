"""How much arithmetic a configuration costs: floating-point operations of matrix products, two for each multiply and add.

Everything else (norms, activations, the sampler's arithmetic) is below a hundredth of it. The counts are of what has to be computed,
as model FLOP utilisation (MFU) wants them: activations that are computed anew in the backward pass don't count twice.
"""

from dataclasses import dataclass
from itertools import pairwise

from mar_model.config import MARConfig
from mar_model.denoiser import FREQUENCIES
from mar_model.diffusion import TRAINING_STEPS
from mar_model.masking import mask_schedule
from mar_model.tokenizers.kl import IMAGE_CHANNELS, KLConfig


def training_flops(config: MARConfig, images: int, masked: int) -> int:
    """One training step, forward and backward, of `images` images with `masked` tokens masked in each.

    Backward costs twice as much as forward, except where the input of a layer needs no gradient.
    """
    kept, tokens = config.tokens - masked, images * masked
    rows = config.diffusion_repeats * tokens
    times = min(rows, TRAINING_STEPS)  # a timestep is embedded once
    forward = (
        _transformer(config, images, kept, masked)
        + _conditions(config, tokens)
        + _times(config, times)
        + _denoiser(config, rows)
    )  # fmt: skip
    without_gradient = images * kept * config.encoder_width * config.token_dim + config.denoiser_width * (
        times * 2 * FREQUENCIES + rows * config.token_dim
    )
    return 3 * forward - 2 * without_gradient


def generation_flops(
    config: MARConfig,
    images: int,
    *,
    ar_steps: int,
    diffusion_steps: int,
    guided: bool,
) -> int:
    """One generation of `images` images, without the tokenizer."""
    return sum(
        ar_step_flops(config, images, kept=config.tokens - before, predicted=before - after, diffusion_steps=diffusion_steps, guided=guided)
        for before, after in pairwise(mask_schedule(config.tokens, ar_steps))
        if before > after
    )


def ar_step_flops(config: MARConfig, images: int, *, kept: int, predicted: int, diffusion_steps: int, guided: bool) -> int:
    """One AR step that predicts `predicted` tokens of each image from `kept` ones; guidance does everything twice."""
    sequences = 2 * images if guided else images
    rows = sequences * predicted
    return (
        _transformer(config, sequences, kept, predicted)
        + _conditions(config, rows)
        + _times(config, diffusion_steps)
        + diffusion_steps * _denoiser(config, rows)
    )


@dataclass(frozen=True)
class TokenizerFlops:
    """Of one image, forward."""

    encode: int
    decode: int


def tokenizer_flops(config: KLConfig, image_size: int) -> TokenizerFlops:
    """An autoencoder of the KL-16 family on one image of `image_size` pixels a side."""
    widths = [config.width * multiplier for multiplier in config.multipliers]
    sides = [image_size >> level for level in range(len(widths))]
    lowest, side = widths[-1], sides[-1]

    def convolution(side: int, inputs: int, outputs: int, kernel: int = 3) -> int:
        return 2 * side**2 * kernel**2 * inputs * outputs

    def residual(side: int, inputs: int, outputs: int) -> int:
        shortcut = convolution(side, inputs, outputs, 1) if inputs != outputs else 0
        return convolution(side, inputs, outputs) + convolution(side, outputs, outputs) + shortcut

    def level(side: int, inputs: int, outputs: int, blocks: int) -> int:
        return residual(side, inputs, outputs) + (blocks - 1) * residual(side, outputs, outputs)

    attention = (4 * convolution(side, lowest, lowest, 1) + 4 * side**4 * lowest) if config.attention else 0
    middle = 2 * residual(side, lowest, lowest) + attention
    moments = 2 * config.channels
    encode = convolution(image_size, IMAGE_CHANNELS, config.width) + middle + config.encoder_blocks * attention
    for here, inputs, outputs in zip(sides, [config.width, *widths], widths, strict=False):
        encode += level(here, inputs, outputs, config.encoder_blocks)
    encode += sum(convolution(below, width, width) for below, width in zip(sides[1:], widths, strict=False))
    encode += convolution(side, lowest, moments) + convolution(side, moments, moments, 1)
    decode = convolution(side, config.channels, config.channels, 1) + convolution(side, config.channels, lowest) + middle
    for here, inputs, outputs in zip(sides, [*widths[1:], lowest], widths, strict=True):
        decode += level(here, inputs, outputs, config.decoder_blocks)
    decode += sum(convolution(above, width, width) for above, width in zip(sides, widths[1:], strict=False))
    return TokenizerFlops(encode, decode + convolution(image_size, widths[0], IMAGE_CHANNELS))


def _product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _transformer(config: MARConfig, images: int, kept: int, chosen: int) -> int:
    """Encoder of `kept` tokens and decoder whose last block computes `chosen` tokens; the buffer is in both."""
    encoder_width, decoder_width = config.encoder_width, config.decoder_width
    seen, length = config.buffer_size + kept, config.buffer_size + config.tokens
    return images * (
        _product(kept, config.token_dim, encoder_width)
        + config.encoder_depth * _block(encoder_width, config.mlp_ratio, seen, seen)
        + _product(seen, encoder_width, decoder_width)
        + (config.decoder_depth - 1) * _block(decoder_width, config.mlp_ratio, length, length)
        + _block(decoder_width, config.mlp_ratio, length, chosen)
    )


def _block(width: int, mlp_ratio: float, length: int, chosen: int) -> int:
    """A transformer block on one sequence, of which `chosen` positions are computed."""
    attention = 2 * _product(chosen, length, width)  # queries · keys, weights · values
    layers = _product(length, width, 3 * width) + _product(chosen, width, width)
    return attention + layers + 2 * _product(chosen, width, int(width * mlp_ratio))


def _conditions(config: MARConfig, tokens: int) -> int:
    return _product(tokens, config.decoder_width, config.denoiser_width)


def _times(config: MARConfig, timesteps: int) -> int:
    return _product(timesteps, 2 * FREQUENCIES, config.denoiser_width) + _product(timesteps, config.denoiser_width, config.denoiser_width)


def _denoiser(config: MARConfig, rows: int) -> int:
    """One evaluation on `rows` noised tokens whose times and conditions are embedded already."""
    width, dim = config.denoiser_width, config.token_dim
    return (
        _product(rows, dim, width) + config.denoiser_depth * _product(rows, width, 5 * width) + _product(rows, width, 2 * width + 2 * dim)
    )
