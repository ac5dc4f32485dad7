"""Floating-point operations of a configuration: matrix products, two operations per multiply-add.

Everything else (norms, activations, the sampler's arithmetic) is below 1 %. The counts are for model FLOP utilisation (MFU): recomputed
activations do not count twice.
"""

from dataclasses import dataclass
from itertools import pairwise

from mar_model.config import MARConfig
from mar_model.head.denoiser import FREQUENCIES
from mar_model.head.diffusion import TRAINING_STEPS, respaced_timesteps
from mar_model.masking import mask_schedule
from mar_model.sampling.feature_reuse import is_complete
from mar_model.sampling.options import GenerationOptions
from mar_model.tokenizers.layers import IMAGE_CHANNELS
from mar_model.tokenizers.network import NetworkConfig


def training_flops(config: MARConfig, images: int, masked: int) -> int:
    """One training step, forward and backward, of `images` images with `masked` tokens masked in each.

    Backward costs twice as much as forward, except for layers whose input needs no gradient.
    """
    kept, tokens = config.tokens - masked, images * masked
    rows = config.diffusion_repeats * tokens
    times = min(rows, TRAINING_STEPS)  # each timestep is embedded once
    forward = (
        images * _transformer(config, kept, masked)
        + _conditions(config, tokens)
        + _times(config, times)
        + _denoiser(config, rows)
    )  # fmt: skip
    without_gradient = images * kept * config.encoder_width * config.token_dim + config.denoiser_width * (
        times * 2 * FREQUENCIES + rows * config.token_dim
    )
    return 3 * forward - 2 * without_gradient


def generation_flops(config: MARConfig, images: int, options: GenerationOptions, filled: int | None = None) -> int:
    """One generation of `images` images with `options`, without the tokenizer.

    Guidance other than 1 doubles the work. filled: the tokens to fill per image in a completion (None: all).
    """
    steps, ar_steps, reuse_steps, guided = options.steps, options.ar_steps, options.reuse_steps, options.guidance != 1.0
    guided_steps = {count: guided * sum(map(options.sampling.guides, respaced_timesteps(count))) for count in set(steps)}
    sequences = 2 * images if any(guided_steps.values()) else images
    flops, drawn_before = 0, 0
    for step, (before, after) in enumerate(pairwise(mask_schedule(config.tokens if filled is None else filled, ar_steps))):
        if before == after:
            continue
        kept, drawn, count = config.tokens - before, before - after, steps[step]
        if not reuse_steps:
            flops += sequences * _transformer(config, kept, drawn)
        elif not drawn_before or is_complete(step, ar_steps, reuse_steps):
            flops += sequences * _transformer(config, kept, config.buffer_size + config.tokens)
        else:
            flops += images * _reusing_transformer(config, kept, drawn_before, drawn)
        rows = images * drawn
        flops += _conditions(config, sequences * drawn) + _times(config, count)
        flops += (count + guided_steps[count]) * _denoiser(config, rows)
        drawn_before = drawn
    return flops


@dataclass(frozen=True)
class TokenizerFlops:
    """Operations of a forward pass on one image."""

    encode: int
    decode: int


def tokenizer_flops(config: NetworkConfig, image_size: int) -> TokenizerFlops:
    """A convolutional autoencoder on one image with sides of `image_size` pixels; for a quantized one both include the search for codes."""
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
    moments = config.channels if config.codebook else 2 * config.channels
    search = convolution(side, config.channels, config.codebook, 1)
    encode = convolution(image_size, IMAGE_CHANNELS, config.width) + middle + search
    encode += config.encoder_blocks * attention * config.encoder_level_attention
    for here, inputs, outputs in zip(sides, [config.width, *widths], widths, strict=False):
        encode += level(here, inputs, outputs, config.encoder_blocks)
    encode += sum(convolution(below, width, width) for below, width in zip(sides[1:], widths, strict=False))
    encode += convolution(side, lowest, moments) + convolution(side, moments, moments, 1)
    decode = convolution(side, config.channels, config.channels, 1) + convolution(side, config.channels, lowest) + middle
    decode += search + config.decoder_blocks * attention * config.decoder_level_attention
    for here, inputs, outputs in zip(sides, [*widths[1:], lowest], widths, strict=True):
        decode += level(here, inputs, outputs, config.decoder_blocks)
    decode += sum(convolution(above, width, width) for above, width in zip(sides, widths[1:], strict=False))
    return TokenizerFlops(encode, decode + convolution(image_size, widths[0], IMAGE_CHANNELS))


def _product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _transformer(config: MARConfig, kept: int, chosen: int) -> int:
    """One sequence: the encoder on `kept` tokens, and the decoder, whose last block computes `chosen` positions; both with buffer."""
    width, ratio, length = config.decoder_width, config.mlp_ratio, config.buffer_size + config.tokens
    blocks = (config.decoder_depth - 1) * _block(width, ratio, length, length, length) + _block(width, ratio, length, chosen, length)
    return _encoder(config, kept, kept) + blocks


def _reusing_transformer(config: MARConfig, kept: int, drawn_before: int, drawn: int) -> int:
    """One sequence in an AR step of `FeatureReuse` that reuses features."""
    length = config.buffer_size + config.tokens
    rows = config.buffer_size + drawn_before + drawn
    decoder = config.decoder_depth * _block(config.decoder_width, config.mlp_ratio, length, rows, rows)
    return _encoder(config, drawn_before, kept) + decoder


def _encoder(config: MARConfig, computed: int, kept: int) -> int:
    """Buffer and `computed` tokens, which attend to buffer and `kept` tokens, including the projection to the decoder's width."""
    rows, seen = config.buffer_size + computed, config.buffer_size + kept
    return (
        _product(computed, config.token_dim, config.encoder_width)
        + config.encoder_depth * _block(config.encoder_width, config.mlp_ratio, seen, rows, rows)
        + _product(rows, config.encoder_width, config.decoder_width)
    )


def _block(width: int, mlp_ratio: float, attended: int, chosen: int, projected: int) -> int:
    """A transformer block on one sequence: queries, keys and values of `projected` positions; `chosen` outputs that attend to `attended`
    positions."""
    attention = 2 * _product(chosen, attended, width)  # queries · keys, weights · values
    layers = _product(projected, width, 3 * width) + _product(chosen, width, width)
    return attention + layers + 2 * _product(chosen, width, int(width * mlp_ratio))


def _conditions(config: MARConfig, tokens: int) -> int:
    return _product(tokens, config.decoder_width, config.denoiser_width)


def _times(config: MARConfig, timesteps: int) -> int:
    return _product(timesteps, 2 * FREQUENCIES, config.denoiser_width) + _product(timesteps, config.denoiser_width, config.denoiser_width)


def _denoiser(config: MARConfig, rows: int) -> int:
    """One evaluation on `rows` noised tokens with embedded times and conditions."""
    width, dim = config.denoiser_width, config.token_dim
    return (
        _product(rows, dim, width) + config.denoiser_depth * _product(rows, width, 5 * width) + _product(rows, width, 2 * width + 2 * dim)
    )
