"""The sizes of released models (LTH14/mar), derived from the shapes of their tensors and from the release's arguments."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from mar_model.config import PUBLISHED, Architecture, MARConfig
from mar_model.files import Shapes

STRIDE, CHANNELS = 16, 16  # of the published tokenizer, KL-16

HEADS = {one.encoder_width: one.encoder_heads for one in PUBLISHED.values()}

# Field of Architecture or MARConfig → the release's argument and its type.
ARGUMENTS: dict[str, tuple[str, type]] = {
    "patch_size": ("patch_size", int),
    "encoder_depth": ("encoder_depth", int),
    "encoder_width": ("encoder_embed_dim", int),
    "encoder_heads": ("encoder_num_heads", int),
    "decoder_depth": ("decoder_depth", int),
    "decoder_width": ("decoder_embed_dim", int),
    "decoder_heads": ("decoder_num_heads", int),
    "mlp_ratio": ("mlp_ratio", float),
    "buffer_size": ("buffer_size", int),
    "attention_dropout": ("attn_dropout", float),
    "projection_dropout": ("proj_dropout", float),
    "label_drop": ("label_drop_prob", float),
    "denoiser_depth": ("diffloss_d", int),
    "denoiser_width": ("diffloss_w", int),
    "diffusion_repeats": ("diffusion_batch_mul", int),
    "mask_ratio_min": ("mask_ratio_min", float),
    "latent_channels": ("vae_embed_dim", int),
    "classes": ("class_num", int),
}


# Size → tensors that determine it: name, number of dimensions, axis, and factor of the size. The most frequent value counts, so that a
# tensor of a wrong shape is reported as such and not as another model.
SIZE_TENSORS: dict[str, list[tuple[str, int, int, int]]] = {
    "classes": [("class_emb.weight", 2, 0, 1)],
    "token_dim": [
        ("z_proj.weight", 2, 1, 1), ("diffloss.net.input_proj.weight", 2, 1, 1), ("diffloss.net.final_layer.linear.bias", 1, 0, 2),
    ],
    "encoder_width": [("z_proj.weight", 2, 0, 1), ("encoder_norm.weight", 1, 0, 1), ("z_proj_ln.weight", 1, 0, 1)],
    "decoder_width": [("mask_token", 3, 2, 1), ("decoder_norm.weight", 1, 0, 1), ("diffloss.net.cond_embed.weight", 2, 1, 1)],
    "denoiser_width": [
        ("diffloss.net.input_proj.weight", 2, 0, 1), ("diffloss.net.cond_embed.bias", 1, 0, 1), ("diffloss.net.input_proj.bias", 1, 0, 1),
    ],
    "positions": [("encoder_pos_embed_learned", 3, 1, 1), ("decoder_pos_embed_learned", 3, 1, 1)],
    "tokens": [("diffusion_pos_embed_learned", 3, 1, 1)],
}  # fmt: skip


def released_config(shapes: Shapes, arguments: Mapping[str, Any], **chosen: int | None) -> MARConfig:
    """The configuration of a MAR state dict. Sources in order of precedence: its shapes, `chosen` (fields of MARConfig, and `stride`),
    the release's `arguments` (text is parsed as numbers), the published values.

    Missing shapes fall back to the arguments, so empty `shapes` give the model that the arguments describe. Raises ValueError if heads or
    patch size are unknown, or sizes do not fit each other.
    """
    told = _told(arguments) | {name: value for name, value in chosen.items() if value is not None}
    seen = _seen(shapes, told.get("buffer_size", Architecture.buffer_size))
    values = asdict(Architecture()) | told | {name: seen[name] for name in seen.keys() & ARGUMENTS.keys()}
    for half in ("encoder", "decoder"):
        width = values[f"{half}_width"]
        if f"{half}_heads" not in told:
            if width not in HEADS and width % 64:
                raise ValueError(f"the number of heads is unknown for {half} width {width}: give the heads")
            values[f"{half}_heads"] = HEADS.get(width, width // 64)
    if "hidden" in seen:
        values["mlp_ratio"] = _mlp_ratio(seen["hidden"], values["mlp_ratio"])
    if "token_dim" in seen:
        values["patch_size"], values["latent_channels"] = _patch(seen["token_dim"], told)
    stride = values.pop("stride", STRIDE)
    side = math.isqrt(seen["tokens"]) if "tokens" in seen else int(float(arguments.get("img_size", 256))) // stride // values["patch_size"]
    if "tokens" in seen and side**2 != seen["tokens"]:
        raise ValueError(f"the position embeddings are for {seen['tokens']} tokens, expected a square number")
    return MARConfig(**{**values, "latent_size": side * values["patch_size"]})


def _told(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MARConfig (and `stride`) from the release's arguments, including a published size by name (`model=mar_large`)."""
    told: dict[str, Any] = {}
    if arguments.get("model") in PUBLISHED:
        size = asdict(PUBLISHED[arguments["model"]])  # not the denoiser, which has separate arguments
        told |= {f"{half}_{name}": size[f"{half}_{name}"] for half in ("encoder", "decoder") for name in ("depth", "width", "heads")}
    for name, (argument, kind) in {**ARGUMENTS, "stride": ("vae_stride", int)}.items():
        if arguments.get(argument) is not None:
            try:
                number = float(arguments[argument])
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number) or (kind is int and not number.is_integer()):
                raise ValueError(f"argument {argument} is {arguments[argument]!r}, expected a {'whole ' if kind is int else ''}number")
            told[name] = kind(number)
    return told


def _seen(shapes: Shapes, buffer: int) -> dict[str, Any]:
    """The sizes that the shapes of a MAR state dict determine; `buffer` is the buffer size if they do not."""
    seen: dict[str, Any] = {}
    for size, tensors in SIZE_TENSORS.items():
        found = [(shapes[name][axis], times) for name, dimensions, axis, times in tensors if len(shapes.get(name, ())) == dimensions]
        if found:
            seen[size] = Counter(value // times for value, times in found).most_common(1)[0][0]
    for name, prefix in (
        ("encoder_depth", "encoder_blocks"),
        ("decoder_depth", "decoder_blocks"),
        ("denoiser_depth", "diffloss.net.res_blocks"),
    ):
        depth = count_modules(shapes, prefix)
        if depth:
            seen[name] = depth
    positions, tokens = seen.get("positions", 0), seen.get("tokens", 0)
    if 0 < tokens < positions and math.isqrt(tokens) ** 2 == tokens:
        seen["buffer_size"] = positions - tokens
    elif positions > buffer:  # the tensor of the tokens is wrong
        seen["tokens"] = positions - buffer
    layers = [shapes.get(f"{half}_blocks.0.mlp.fc1.weight", ()) for half in ("encoder", "decoder")]
    hidden = [(layer[1], layer[0]) for layer in layers if len(layer) == 2 and min(layer) > 0]
    if hidden:
        seen["hidden"] = hidden
    return seen


def count_modules(names: Collection[str], prefix: str) -> int:
    """The length of a module list: one more than the highest number after `prefix.`, but at most the number of names, because a foreign
    file may contain any number."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return min(max((int(match[1]) + 1 for match in numbers if match), default=0), len(names))


def _mlp_ratio(hidden: list[tuple[int, int]], told: float) -> float:
    """The MLP ratio with hidden width = int(width · ratio) for all (width, hidden width); `told` if it satisfies this."""
    if all(int(width * told) == outputs for width, outputs in hidden):
        return told
    ratio = max(outputs / width for width, outputs in hidden)
    while any(int(width * ratio) < outputs for width, outputs in hidden):  # the quotient may have been rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _patch(token_dim: int, told: Mapping[str, Any]) -> tuple[int, int]:
    """Patch size and latent channels of tokens of `token_dim` values."""
    patch, channels = told.get("patch_size"), told.get("latent_channels")
    if patch is None:
        patch = math.isqrt(token_dim // max(channels or CHANNELS, 1))
        channels = channels or CHANNELS
    elif channels is None:
        channels = token_dim // max(patch, 1) ** 2
    if patch < 1 or token_dim != channels * patch**2:
        raise ValueError(
            f"tokens have {token_dim} values, but {channels} latent channels in patches of {max(patch, 1)}×{max(patch, 1)} have not: "
            "give the patch size and the tokenizer"
        )
    return patch, channels
