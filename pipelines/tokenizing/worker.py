"""What each Ray Train worker of stage *tokenize* runs: its share of every batch, then the figures and files of the result."""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mar_model.checkpoints.checkpoint import load_weights, optimizer_tensors
from mar_model.noise import stream
from mar_model.tokenizers import KLAutoencoder, posterior_kl, sample_posterior
from mar_model.training.recipe import crosses, learning_rate
from mar_model.training.sample_order import SampleOrder
from pipelines.images.pixels import to_model
from pipelines.images.reading import DecodedImages
from pipelines.runtime import storage
from pipelines.runtime.cluster.channel import Metrics
from pipelines.runtime.cluster.precision import autocast
from pipelines.runtime.cluster.workers import default_device, use_threads
from pipelines.runtime.records import damaged
from pipelines.tokenizing.job import TokenizerJob
from pipelines.tokenizing.result import diverged, write_result
from pipelines.tokenizing.settings import TokenizerSettings

PROGRESS = "progress.safetensors"  # weights, optimizer and curve of a run under way, in one file so that it is whole or not there
WARMUP_SHARE = 0.05
GRADIENT_CLIP = 1.0
LOG_LINES = 200  # a run


@dataclass(frozen=True)
class Result:
    """What `training.json` holds."""

    psnr_images: int
    loss: float
    loss_curve: list[tuple[float, float]]
    psnr_held_out: float | None = None  # or
    psnr_train: float | None = None


class Objective(nn.Module):
    """Mean squared error per pixel value (images in [-1, 1]), plus `kl_weight` times KL(posterior ‖ normal) per image over the number
    of pixel values: both are sums over an image, divided by the same number, as in arXiv 2112.10752 (without its perceptual
    and adversarial terms)."""

    def __init__(self, tokenizer: KLAutoencoder, kl_weight: float) -> None:
        super().__init__()
        self.tokenizer, self.kl_weight = tokenizer, kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images (B, 3, H, W), posterior noise (B, C, h, w) → loss, squared error and KL in nats an image, each a mean over B: (3,)."""
        moments = self.tokenizer.encode(images).float()
        reconstruction = self.tokenizer.decode(sample_posterior(moments, noise)).float()
        error = (reconstruction - images).square().mean()
        kl = posterior_kl(moments).mean()
        return torch.stack([error + self.kl_weight * kl / images[0].numel(), error, kl])


def tokenize_worker(loop_config: dict[str, TokenizerJob]) -> None:
    """Train from `progress.safetensors` (or from the start) to `tokenizer.images`; worker 0 writes the result."""
    import ray
    import ray.train

    job = loop_config["job"]
    settings, seed = job.tokenizer, job.seed
    context = ray.train.get_context()
    worker, workers = context.get_world_rank(), context.get_world_size()
    use_threads(job.cluster)
    device = default_device()
    listing = ray.get(job.listing)

    tokenizer = initial_tokenizer(settings, seed).to(device)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    images_seen, curve = load_progress(settings.path, tokenizer, optimizer)
    objective: nn.Module = Objective(tokenizer, settings.kl_weight)
    if workers > 1:
        objective = nn.parallel.DistributedDataParallel(objective)

    train = DecodedImages(job.images, listing.train())
    latent = (settings.channels, job.images.size // settings.stride, job.images.size // settings.stride)
    sums, steps, began, first = torch.zeros(3, device=device), 0, time.perf_counter(), images_seen
    log_every = max(settings.images // LOG_LINES, settings.batch)
    for pixels, noise in batches(train, settings, latent, seed, images_seen, worker, workers):
        rate = learning_rate(images_seen, settings.learning_rate, int(WARMUP_SHARE * settings.images), "cosine", settings.images)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(settings.precision, device):
            losses = objective(pixels.to(device), noise.to(device))
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums, steps, images_seen = sums + losses.detach(), steps + 1, images_seen + settings.batch

        ended = images_seen >= settings.images
        if ended or crosses(images_seen, settings.batch, log_every):
            means = sums / (steps * workers)
            if workers > 1:
                torch.distributed.all_reduce(means)
            loss, error, kl = means.tolist()
            if not math.isfinite(loss):
                raise diverged(f"loss {loss} at {images_seen} images", settings)
            curve.append([images_seen, loss])
            speed = (images_seen - first) / (time.perf_counter() - began)
            row = {"loss": loss, "squared_error": error, "kl": kl, "learning_rate": rate, "images_per_second": speed}
            if worker == 0:
                job.channel.send(Metrics({"images_seen": images_seen, **row}))
            sums, steps = torch.zeros(3, device=device), 0
        if worker == 0 and (ended or crosses(images_seen, settings.batch, settings.checkpoint_images)):
            save_progress(settings.path, tokenizer, optimizer, images_seen, curve)
    if worker == 0:
        figures = {"loss": curve[-1][1]}
        if images_seen > first:  # else a killed run had trained on all of them
            figures["images_per_second"] = round((images_seen - first) / (time.perf_counter() - began), 3)
        write_result(job, tokenizer.eval(), listing, {**figures, "rejected": len(train.rejected), "loss_curve": curve})


def initial_tokenizer(settings: TokenizerSettings, seed: int) -> KLAutoencoder:
    """The autoencoder with its random initial weights, the same in every worker."""
    with torch.random.fork_rng():
        torch.manual_seed(stream(seed, "tokenize", "weights").initial_seed())
        return KLAutoencoder(settings.network())


def batches(
    images: DecodedImages,
    settings: TokenizerSettings,
    latent: tuple[int, int, int],
    seed: int,
    images_seen: int,
    worker: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This worker's share of each global batch from `images_seen` to the end of training: images (b, 3, H, W) and posterior noise
    (b, C, h, w), the next prepared on a thread meanwhile. Noise is drawn for the global batch, so that it depends on no worker."""
    order = SampleOrder(stream(seed, "tokenize", "order").initial_seed(), len(images.rows))
    share = slice(worker * settings.batch // workers, (worker + 1) * settings.batch // workers)

    def prepare(start: int) -> tuple[Tensor, Tensor]:
        rows = order.indices(start, start + settings.batch)[share]
        noise = torch.randn(settings.batch, *latent, generator=stream(seed, "tokenize", start))[share]
        return to_model(images.take(rows)[0]), noise

    starts = range(images_seen, settings.images, settings.batch)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
        upcoming = ahead.submit(prepare, starts[0]) if starts else None
        for index in range(len(starts)):
            assert upcoming is not None
            ready = upcoming.result()
            if index + 1 < len(starts):
                upcoming = ahead.submit(prepare, starts[index + 1])
            yield ready


def save_progress(path: str, tokenizer: nn.Module, optimizer: torch.optim.Optimizer, images_seen: int, curve: list[list[float]]) -> None:
    """Write the one file that a killed run goes on from."""
    weights = {f"weight.{name}": value.detach().contiguous().cpu() for name, value in tokenizer.state_dict().items()}
    metadata = {"images_seen": str(images_seen), "loss_curve": json.dumps(curve)}
    tensors = {**weights, **optimizer_tensors(tokenizer, optimizer)}
    storage.write_bytes(storage.join(path, PROGRESS), safetensors.torch.save(tensors, metadata))


def load_progress(path: str, tokenizer: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[list[float]]]:
    """Put weights and optimizer state back; returns images seen and the loss curve so far (0 and [] where nothing was saved)."""
    file = storage.join(path, PROGRESS)
    if not storage.exists(file):
        return 0, []
    tensors, images_seen, curve = read_progress(file)
    load_weights(tokenizer, {name.removeprefix("weight."): value for name, value in tensors.items() if name.startswith("weight.")})
    for name, parameter in tokenizer.named_parameters():
        state = {kind: tensors[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {kind: value.to(parameter.device) for kind, value in state.items()}
    return images_seen, curve


def read_progress(file: str) -> tuple[dict[str, Tensor], int, list[list[float]]]:
    """What `save_progress` wrote: tensors, images seen and the loss curve. Raises DamagedFileError."""
    data = storage.read_bytes(file)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # 8 bytes of its length, then JSON
        metadata = header["__metadata__"]
        return tensors, int(metadata["images_seen"]), json.loads(metadata["loss_curve"])
    except (safetensors.SafetensorError, ValueError, LookupError) as error:
        raise damaged(file, error, "delete it, and the tokenizer is trained from the start") from error
