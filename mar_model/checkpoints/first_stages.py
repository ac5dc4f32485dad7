"""Published autoencoders, as tokenizer directories: `kl16.ckpt` of the MAR release, and LDM's `vq-f16`, `kl-f16` and `kl-f8`
(CompVis/latent-diffusion), which are Lightning checkpoints."""

from collections import Counter
from pathlib import Path

from mar_model.checkpoints.released_file import RAW, ReleasedFile, check_finite, in_float32
from mar_model.checkpoints.released_sizes import count_modules
from mar_model.files import Shapes, describe_misfit, shapes_of
from mar_model.tokenizers import KLConfig, VQConfig, save_tokenizer, without_weights

CODEBOOK = "quantize.embedding.weight"
MOST_LEVELS = 16


def import_tokenizer(path: Path, directory: Path) -> KLConfig | VQConfig:
    """Write a published autoencoder as a tokenizer directory, in the memory of one copy of the weights.

    Raises ValueError, before anything is written, listing what does not fit or is not finite.
    """
    file = ReleasedFile(path)
    shapes = shapes_of(file.weights[RAW])
    config = released_network_config(shapes)
    tokenizer = without_weights(config)
    misfit = describe_misfit(shapes_of(tokenizer.state_dict()), shapes)
    if misfit:
        kind = "VQ" if isinstance(config, VQConfig) else "KL"
        raise ValueError(f"{path} does not hold a {kind} autoencoder of the sizes that its tensors have: {misfit}")
    check_finite(file, RAW)
    file = ReleasedFile(path)  # a new memory map: the pages that were just read no longer count as used
    tokenizer.load_state_dict(in_float32(file, RAW), assign=True)
    save_tokenizer(tokenizer, directory)
    return config


def released_network_config(shapes: Shapes) -> KLConfig | VQConfig:
    """The sizes of an autoencoder's state dict; where a shape is missing, those of KL-16. Raises ValueError for sizes that do not
    describe a network."""
    quantized = CODEBOOK in shapes
    moments = 1 if quantized else 2
    channels = _most_frequent(
        shapes,
        [
            ("post_quant_conv.weight", 4, 0, 1), ("post_quant_conv.bias", 1, 0, 1), ("decoder.conv_in.weight", 4, 1, 1),
            ("quant_conv.bias", 1, 0, moments), ("encoder.conv_out.bias", 1, 0, moments), (CODEBOOK, 2, 1, 1),
        ],
        KLConfig.channels,
    )  # fmt: skip
    width = _most_frequent(
        shapes,
        [
            ("encoder.conv_in.weight", 4, 0, 1), ("encoder.conv_in.bias", 1, 0, 1), ("encoder.down.0.block.0.norm1.weight", 1, 0, 1),
        ],
        KLConfig.width,
    )  # fmt: skip
    levels = count_modules(shapes, "encoder.down") or len(KLConfig.multipliers)
    if levels > MOST_LEVELS:
        raise ValueError(f"the tensors are of an encoder with {levels} levels, expected {MOST_LEVELS} or fewer")
    lowest = levels - 1
    multipliers = [_level_width(shapes, level, width) // max(width, 1) for level in range(levels)]
    published = KLConfig.multipliers if not shapes else tuple(max(one, 1) for one in multipliers)
    encoder, decoder = f"encoder.down.{lowest}.attn.0.q.weight" in shapes, f"decoder.up.{lowest}.attn.0.q.weight" in shapes
    sizes = KLConfig(
        channels=channels,
        width=width,
        multipliers=published,
        encoder_blocks=count_modules(shapes, "encoder.down.0.block") or KLConfig.encoder_blocks,
        decoder_blocks=count_modules(shapes, "decoder.up.0.block") or KLConfig.decoder_blocks,
        attention="encoder.mid.attn_1.q.weight" in shapes or not shapes,
        level_attention="both" if decoder else "encoder" if encoder or not shapes else "none",
    )
    if not quantized:
        return sizes
    codes = shapes[CODEBOOK][0] if len(shapes[CODEBOOK]) == 2 else VQConfig.codes
    return VQConfig(**vars(sizes), codes=codes)


def _level_width(shapes: Shapes, level: int, width: int) -> int:
    prefix = f"encoder.down.{level}.block.0"
    tellers = [(f"{prefix}.conv1.weight", 4, 0, 1), (f"{prefix}.norm2.weight", 1, 0, 1), (f"{prefix}.conv2.bias", 1, 0, 1)]
    return _most_frequent(shapes, tellers, width)


def _most_frequent(shapes: Shapes, tellers: list[tuple[str, int, int, int]], default: int) -> int:
    """A size by the tensors (name, number of dimensions, axis, how many times the size it is there) that have it: the most frequent
    value, so that one tensor of a wrong shape is reported as such and not taken for another network."""
    found = [shapes[name][axis] // times for name, dimensions, axis, times in tellers if len(shapes.get(name, ())) == dimensions]
    return Counter(found).most_common(1)[0][0] if found else default
