"""Checks of a configuration's numbers: ranges, divisibility, contradictions."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig
    from pipelines.generation.settings import GenerateSettings

# Numbers must be above zero, unless their default is zero or they are listed here.
ZERO_ALLOWED = {
    "images.max_rejected", "tokenizer.kl_weight", "train.warmup_images", "train.weight_decay", "train.beta1", "train.beta2",
    "train.ema_decay", "train.failures", "model.attention_dropout", "model.projection_dropout", "model.label_drop",
    "model.mask_ratio_min", "generate.guidance", "generate.temperature",
}  # fmt: skip
BELOW_ONE = {
    "images.held_out_share", "train.beta1", "train.beta2", "train.ema_decay", "model.attention_dropout", "model.projection_dropout",
}  # fmt: skip
AT_MOST_ONE = {"images.max_rejected", "generate.eta", "model.label_drop", "model.mask_ratio_min"}
DIFFUSION_STEPS = 1000  # steps of the published schedule; generation uses a subset


def misfits(config: "RunConfig") -> Iterator[tuple[str, str]]:
    """Yield (section.key, message) for every number that is out of range or does not fit another."""
    out_of_range = list(_out_of_range(config))
    yield from out_of_range or [*_not_dividing(config), *_contradictions(config)]


def _out_of_range(config: "RunConfig") -> Iterator[tuple[str, str]]:
    if config.seed < 0:
        yield "seed", f"seed is {config.seed}, expected 0 or more"
    for section in type(config).model_fields:
        settings = getattr(config, section)
        for one in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
            key, value = f"{section}.{one.name}", getattr(settings, one.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                expected = _expected(key, value, zero_allowed=key in ZERO_ALLOWED or one.default == 0)
                if expected:
                    yield key, f"{key} is {value}, expected {expected}"
    if not config.tokenizer.multipliers or min(config.tokenizer.multipliers) < 1:
        yield (
            "tokenizer.multipliers",
            f"tokenizer.multipliers is {config.tokenizer.multipliers}, expected one number above 0 per level",
        )
    yield from _out_of_range_in_generation(config.generate)


def _out_of_range_in_generation(generate: "GenerateSettings") -> Iterator[tuple[str, str]]:
    steps, end, interval = generate.diffusion_steps, generate.diffusion_steps_end, generate.guidance_interval
    expected = {}
    if any(isinstance(one, int) and one < 0 for one in generate.labels):
        expected["labels"] = "class numbers from 0"
    if any(one < 0 for one in generate.samples) or len(set(generate.samples)) < len(generate.samples):
        expected["samples"] = "distinct sample numbers from 0"
    if steps > DIFFUSION_STEPS:
        expected["diffusion_steps"] = f"{DIFFUSION_STEPS} or fewer"
    elif end > steps:
        expected["diffusion_steps_end"] = f"at most generate.diffusion_steps, which is {steps}"
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        expected["guidance_interval"] = "two shares in ascending order, e.g. [0.2, 0.8]"
    for name, allowed in expected.items():
        yield f"generate.{name}", f"generate.{name} is {getattr(generate, name)}, expected {allowed}"


def _expected(key: str, value: float, zero_allowed: bool) -> str:
    """The allowed values as text, if `value` is not allowed; otherwise empty."""
    if key in BELOW_ONE and not 0 <= value < 1:
        return "a share from 0 up to, not including, 1"
    if key in AT_MOST_ONE and not 0 <= value <= 1:
        return "a share between 0 and 1"
    if zero_allowed:
        return "" if 0 <= value < float("inf") else "0 or more"
    return "" if 0 < value < float("inf") else "a number above 0"


def _not_dividing(config: "RunConfig") -> Iterator[tuple[str, str]]:
    stride, patch = config.tokenizer.stride, config.model.patch_size
    if config.images.size % stride:
        about = f"the tokenizer's stride {stride} (tokenizer.multipliers has {len(config.tokenizer.multipliers)} levels)"
        yield "images.size", f"images.size is {config.images.size}, expected a multiple of {about}"
    elif config.images.size // stride % patch:
        about = f"the latent side {config.images.size // stride} (images.size {config.images.size} / tokenizer stride {stride})"
        yield "model.patch_size", f"model.patch_size is {patch}, expected a divisor of {about}"
    if config.train.batch % config.train.micro_batch:
        about = f"train.micro_batch, which is {config.train.micro_batch}"
        yield "train.batch", f"train.batch is {config.train.batch}, expected a multiple of {about}"
    elif config.train.batch // config.train.micro_batch < config.train.workers:
        about = f"train.batch {config.train.batch} has only {config.train.batch // config.train.micro_batch} micro-batches"
        yield "train.workers", f"train.workers is {config.train.workers}, expected at least one micro-batch per worker: {about}"
    if config.tokenizer.kind == "kl" and config.tokenizer.batch % config.tokenizer.workers:
        about = f"tokenizer.workers, which is {config.tokenizer.workers}"
        yield "tokenizer.batch", f"tokenizer.batch is {config.tokenizer.batch}, expected a multiple of {about}"
    halves = {
        "encoder": (config.model.encoder_width, config.model.encoder_heads),
        "decoder": (config.model.decoder_width, config.model.decoder_heads),
    }
    for half, (width, heads) in halves.items():
        if width % heads:
            key = f"model.{half}_heads"
            yield key, f"{key} is {heads}, expected a divisor of model.{half}_width, which is {width}"


def _contradictions(config: "RunConfig") -> Iterator[tuple[str, str]]:
    if config.train.schedule == "cosine" and not config.train.schedule_images:
        key = "train.schedule_images"
        yield key, f"{key} is 0, expected the images at which the cosine schedule (train.schedule) reaches zero, e.g. {config.train.images}"
    if config.generate.ema_decay and not config.generate.ema:
        key = "generate.ema_decay"
        yield key, f"{key} is {config.generate.ema_decay:g}, but generate.ema is false, which selects the raw weights; reset one of them"
    if config.images.held_out_share and config.images.held_out_folder:
        yield (
            "images.held_out_share",
            f"images.held_out_share is {config.images.held_out_share} and images.held_out_folder {config.images.held_out_folder!r}, "
            "expected only one of them: the split is by hash or by folder",
        )
