"""An estimate of a training run: memory, time, disk and network, each figure with its derivation."""

import difflib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.estimate import bytes_a_parameter, cache_bytes, checkpoints_on_disk, model_config, record_bytes
from mar_model.training.gpus import GPU
from mar_model.training.gpus import KNOWN as KNOWN_GPUS
from pipelines.runtime.errors import UserError

if TYPE_CHECKING:
    from jobs.config.schema import RunConfig

IMAGENET = (1_281_167, 1000)  # images and classes, used if there is no cache
EFFICIENCY = 0.23  # MFU of the release's measured 254 images/s per H100 for mar_large
CONTEXT_BYTES = 1_500_000_000  # CUDA's context, kernels and NCCL's buffers, approximately
GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class Figure:
    """One number of the plan."""

    section: str
    name: str
    value: float
    unit: str
    made_of: str


@dataclass(frozen=True)
class Assumptions:
    """The inputs of a plan besides the configuration."""

    gpu: GPU
    gpus: int
    epochs: float = 400
    images: int = IMAGENET[0]
    classes: int = IMAGENET[1]
    efficiency: float = EFFICIENCY
    images_per_second_per_gpu: float | None = None  # instead of `efficiency`


def gpu(name: str, peak_tflops: float | None = None, memory_gb: float | None = None) -> GPU:
    """The known GPU of that name, with the given figures replacing its own, or another GPU with both figures given.

    Raises UserError for an unknown name without both figures.
    """
    known = KNOWN_GPUS.get(name.lower())
    if known is None and (peak_tflops is None or memory_gb is None):
        near = [one for one in KNOWN_GPUS if one.startswith(name.lower())] or difflib.get_close_matches(name.lower(), KNOWN_GPUS, n=1)
        nearest = f"; nearest: {' or '.join(near)}" if near else ""
        raise UserError(
            f"--gpu {name!r} is not known, expected one of {', '.join(KNOWN_GPUS)}{nearest}",
            remedy="for another GPU give --peak-tflops (dense bf16) and --memory-gb",
        )
    tflops = peak_tflops or (known.tflops if known else 0.0)
    memory = memory_gb or (known.memory_gb if known else 0.0)
    given = peak_tflops is not None or memory_gb is not None
    return GPU(name, tflops, memory, known.source if known and not given else "as given")


def images_and_classes(config: "RunConfig") -> tuple[int, int]:
    """Images and classes of the cache at `cache.path`, if it is on this machine; otherwise ImageNet's."""
    from pipelines.caching.latent_cache import LatentCache
    from pipelines.caching.latent_format import MANIFEST
    from pipelines.runtime import storage

    if not storage.is_local(config.cache.path) or not storage.exists(storage.join(config.cache.path, MANIFEST)):
        return IMAGENET
    cache = LatentCache(config.cache.path)
    return len(cache), len(cache.manifest.class_names)


def figures(config: "RunConfig", given: Assumptions) -> list[Figure]:
    """All figures of training `config` under these assumptions. Raises UserError if they are inconsistent."""
    _check(config, given)
    parameters, memory = _memory(config, given)
    speed, images_per_second = _speed(config, given)
    return [
        *memory,
        *speed,
        *_storage(config, given, parameters, images_per_second),
        *_network(config, given, parameters, images_per_second),
    ]


def _check(config: "RunConfig", given: Assumptions) -> None:
    for name, value in {
        "--gpus": given.gpus, "--epochs": given.epochs, "--images": given.images, "--efficiency": given.efficiency,
        "--peak-tflops": given.gpu.tflops, "--memory-gb": given.gpu.memory_gb,
        "--images-per-second-per-gpu": given.images_per_second_per_gpu,
    }.items():  # fmt: skip
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}, expected a number above 0")
    if given.efficiency > 1:
        raise UserError(f"--efficiency is {given.efficiency}, expected a share of the GPU's peak, at most 1 (the release: {EFFICIENCY})")
    micro_batches = config.train.batch // config.train.micro_batch
    if given.gpus > micro_batches:
        raise UserError(
            f"--gpus is {given.gpus}, but train.batch {config.train.batch} has only {micro_batches} micro-batches of "
            f"{config.train.micro_batch}, expected at least one per GPU",
            remedy=f"set train.micro_batch={max(1, config.train.batch // given.gpus)}",
        )


def _memory(config: "RunConfig", given: Assumptions) -> tuple[int, list[Figure]]:
    from mar_model.training.footprint import activation_bytes, gathered_parameters, parameter_count

    sizes = model_config(config, given.classes)
    parameters, micro_batch = parameter_count(sizes), config.train.micro_batch
    sharded, averages = _sharded(config, given), 1 + len(config.train.ema_decays)
    value_bytes = 4 if config.train.precision == "float32" else 2
    own, of = (parameters / given.gpus, f" / {given.gpus} GPUs (fsdp)") if sharded else (parameters, "")
    held = {
        "weights": (4 * own, f"{parameters:,} parameters × 4 bytes{of}"),
        "moving averages (EMA)": (4 * own * averages, f"{averages}, float32{of}"),
        "Adam's moments": (8 * own, f"two, float32{of}"),
        "gradients": (4 * own, f"float32{of}"),
    }
    if sharded:
        largest, outside = gathered_parameters(sizes)
        gathered = 2 * largest * value_bytes + 4 * outside
        held["gathered weights"] = (gathered, f"two blocks of {largest:,} parameters, and {outside:,} parameters outside blocks")
    elif value_bytes == 2:
        held["bf16 weights"] = (2 * parameters, "copies for matrix products, during one forward and backward pass")
    held["CUDA"] = (CONTEXT_BYTES, "context, kernels and communication buffers, approximately")
    kept, again = (
        micro_batch * activation_bytes(sizes, sizes.tokens, value_bytes=value_bytes, recompute=recompute) for recompute in (False, True)
    )
    an_image = f"{micro_batch} images (train.micro_batch)"
    fixed = sum(value for value, _ in held.values())

    def figure(name: str, value: float, made_of: str) -> Figure:
        return Figure("memory a GPU", name, value / GB, "GB", made_of)

    def room(value: float) -> str:
        left = given.gpu.memory_gb - value / GB
        return f"{left:.1f} GB of {given.gpu.memory_gb:g} left" if left >= 0 else f"{-left:.1f} GB MORE THAN {given.gpu.memory_gb:g}"

    return parameters, [
        *(figure(name, value, made_of) for name, (value, made_of) in held.items()),
        figure("activations", kept, f"{an_image} × {kept / micro_batch / MB:.0f} MB, all tokens masked (the maximum)"),
        figure("activations, checkpointed", again, f"{an_image} × {again / micro_batch / MB:.0f} MB: inputs of all blocks, and one block"),
        figure("in all", fixed + kept, room(fixed + kept)),
        figure("in all, checkpointed", fixed + again, room(fixed + again)),
    ]


def _sharded(config: "RunConfig", given: Assumptions) -> bool:
    return config.train.strategy == "fsdp" and given.gpus > 1


def _speed(config: "RunConfig", given: Assumptions) -> tuple[list[Figure], float]:
    from mar_model.flops import training_flops
    from mar_model.masking import masked_tokens, mean_mask_ratio

    sizes, micro_batch = model_config(config, given.classes), config.train.micro_batch
    ratio = mean_mask_ratio(sizes.mask_ratio_mean, sizes.mask_ratio_std, sizes.mask_ratio_min)
    masked = masked_tokens(sizes.tokens, ratio)
    flops = training_flops(sizes, micro_batch, masked) / micro_batch
    peak = given.gpu.tflops * 1e12
    measured = given.images_per_second_per_gpu
    rate = measured or given.efficiency * peak / flops
    efficiency = rate * flops / peak
    micro_batches = config.train.batch // micro_batch
    turns = math.ceil(micro_batches / given.gpus)
    total = given.gpus * rate * micro_batches / (given.gpus * turns)
    images = given.epochs * given.images
    hours = images / total / 3600
    even = "" if micro_batches % given.gpus == 0 else f", {micro_batches} micro-batches divided unevenly: {turns} on the busiest"
    peaks = f"{given.gpu.tflops:g} TFLOP/s dense bf16"

    def figure(name: str, value: float, unit: str, made_of: str) -> Figure:
        return Figure("time", name, value, unit, made_of)

    return [
        figure("an image", flops / 1e9, "GFLOP", f"forward and backward, {masked} of {sizes.tokens} tokens masked (the mean)"),
        figure("MFU", efficiency, "", f"from --images-per-second-per-gpu, of {peaks}" if measured else f"--efficiency, of {peaks}"),
        figure("speed of a GPU", rate, "images/s", "as given" if measured else "MFU × peak / FLOP per image"),
        figure("speed", total, "images/s", f"{given.gpus} GPUs{even}"),
        figure("a step", config.train.batch / total, "s", f"train.batch, {config.train.batch} images"),
        figure("steps", math.ceil(images / config.train.batch), "", f"{given.epochs:g} epochs of {given.images:,} images"),
        figure("hours", hours, "h", "images / speed; checkpoints, restarts and validation not counted"),
        figure("GPU-hours", hours * given.gpus, "h", f"{given.gpus} GPUs × hours"),
    ], total


def _storage(config: "RunConfig", given: Assumptions, parameters: int, images_per_second: float) -> list[Figure]:
    cache, record, each = cache_bytes(config, given.images), record_bytes(config), bytes_a_parameter(config)
    checkpoint, kept = parameters * each, checkpoints_on_disk(config)
    averages = f"{1 + len(config.train.ema_decays)} averages" if config.train.ema_decays else "EMA"
    both = f"{given.images:,} images × 2 (mirrored) × {record:,} bytes, {config.cache.dtype}"

    def figure(name: str, value: float, unit: str, made_of: str) -> Figure:
        return Figure("storage", name, value / (MB if unit == "MB/s" else GB), unit, made_of)

    return [
        figure("latent cache", cache, "GB", both),
        figure("read from the cache", images_per_second * record, "MB/s", "speed × one record, for all GPUs"),
        figure("a checkpoint", checkpoint, "GB", f"weights, {averages}, Adam: {each} bytes per parameter"),
        figure("checkpoints", checkpoint * sum(kept.values()), "GB", ", ".join(f"{count} {why}" for why, count in kept.items() if count)),
    ]


def _network(config: "RunConfig", given: Assumptions, parameters: int, images_per_second: float) -> list[Figure]:
    others = (given.gpus - 1) / given.gpus
    sent, made_of = 2 * others * 4 * parameters, "all-reduce: 2(n − 1)/n of the float32 gradients sent, and as much received"
    if _sharded(config, given):
        turns = math.ceil(config.train.batch // config.train.micro_batch / given.gpus)
        value_bytes = 4 if config.train.precision == "float32" else 2
        sent = others * (4 + 2 * turns * value_bytes) * parameters
        made_of = f"(n − 1)/n of the float32 gradients, and of the weights {turns} × 2 times, {value_bytes} bytes each"
    steps = images_per_second / config.train.batch
    return [
        Figure("network a GPU", "a step", sent / GB, "GB", made_of),
        Figure("network a GPU", "a second", sent * steps / GB, "GB/s", "each way, spread over the whole step"),
    ]


def table(config: "RunConfig", given: Assumptions) -> str:
    """The figures as text."""
    kind = f"{given.gpu.name} ({given.gpu.tflops:g} TFLOP/s dense bf16, {given.gpu.memory_gb:g} GB; {given.gpu.source})"
    lines = [f"{given.gpus} × {kind}, {given.epochs:g} epochs of {given.images:,} images in {given.classes:,} classes"]
    section = ""
    for one in figures(config, given):
        if one.section != section:
            section = one.section
            lines.append(f"\n{section}")
        number = f"{one.value:,.0f}" if one.value >= 1000 else f"{one.value:.3g}" if one.value < 1 else f"{one.value:.1f}"
        lines.append(f"  {one.name:<26}{number:>12} {one.unit:<9} {one.made_of}")
    return "\n".join(lines)


def plain(config: "RunConfig", given: Assumptions) -> dict[str, Any]:
    """The figures as JSON values: the assumptions, and section → name → value, unit, made_of."""
    sections: dict[str, dict[str, Any]] = {}
    for one in figures(config, given):
        sections.setdefault(one.section, {})[one.name] = {"value": one.value, "unit": one.unit, "made_of": one.made_of}
    return {"assumptions": asdict(given), **sections}
