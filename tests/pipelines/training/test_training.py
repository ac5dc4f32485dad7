"""Training through a real Ray Train: resumed = uninterrupted, damaged checkpoints, refusals."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from listening import Listening
from PIL import Image
from safetensors.torch import load_file

from jobs.stages import guarded
from mar_model.checkpoints.checkpoint import load_model
from mar_model.config import Architecture
from mar_model.tokenizers import KLAutoencoder, KLConfig, save_tokenizer
from pipelines.caching.latent_cache import LatentCache
from pipelines.caching.settings import CacheSettings
from pipelines.caching.stage import cache
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.training.data import LatentDataset, MicroBatches, share_of
from pipelines.training.settings import TrainSettings
from pipelines.training.stage import model_config, newest_checkpoint, train
from pipelines.training.state import initial_model

ARCHITECTURE = Architecture(
    encoder_depth=1, encoder_width=32, encoder_heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, buffer_size=2,
    denoiser_depth=1, denoiser_width=32,
)  # fmt: skip
RECIPE = TrainSettings(
    images=96, batch=16, micro_batch=4, learning_rate=1e-3, warmup_images=32, ema_decay=0.99, workers=2, precision="float32",
    checkpoint_images=48, log_images=48, failures=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def sections(ray_local: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CacheSettings]:
    """A cache of 40 random 16×16 images in two classes."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index in range(40):
        file = root / "images" / f"class-{index % 2}" / f"{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    tokenizer = str(root / "tokenizer")
    config = KLConfig(width=32, multipliers=(1, 1, 1), channels=4, encoder_blocks=1, decoder_blocks=1, attention=False)
    save_tokenizer(KLAutoencoder(config), root / "tokenizer")
    settings = CacheSettings(path=str(root / "cache"), shard_images=16)
    cache(Images(ImageSettings(source=str(root / "images"), size=16)), tokenizer, settings, Stage("cache", ray_local))
    return tokenizer, settings


def weights(path: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(str(path))
    assert newest is not None
    return load_file(Path(newest) / name)


def test_interrupted_equals_uninterrupted_bit_by_bit(sections: tuple[str, CacheSettings], stage: Stage, tmp_path: Path) -> None:
    whole, parts = replace(RECIPE, path=str(tmp_path / "whole")), replace(RECIPE, path=str(tmp_path / "parts"))
    summary = train(*sections, ARCHITECTURE, whole, stage)
    assert summary["images_seen"] == 96
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_seen"] for row in rows] == [48, 96]
    logged = {"loss", "loss_band_0", "loss_band_3", "gradient_norm", "learning_rate", "images_per_second", "data_wait_share"}
    assert logged <= rows[0].keys()

    train(*sections, ARCHITECTURE, replace(parts, images=48), stage)
    model, state = load_model(Path(newest_checkpoint(str(tmp_path / "parts")) or ""))
    assert state["cache_digest"] == LatentCache(sections[1].path).digest
    assert model.config == model_config(ARCHITECTURE, LatentCache(sections[1].path))

    damaged = tmp_path / "parts" / "checkpoints" / "images-000000000072"
    shutil.copytree(damaged.with_name("images-000000000048"), damaged)
    (damaged / "ema.safetensors").write_bytes(b"cut off")

    # a longer run of the same identity goes on from 48 images, whether its activations are kept or computed anew
    listening = Listening(stage.cluster)
    longer = train(*sections, ARCHITECTURE, replace(parts, activation_checkpointing=True), listening)
    assert longer["resumed_from"] == 48
    assert len([line for line in listening.said if line.startswith("checkpoint images-000000000072 skipped: ")]) == 1, listening.said
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        expected, found = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    assert longer["loss"] == summary["loss"]

    assert train(*sections, ARCHITECTURE, parts, stage)["images_seen"] == 96  # complete: nothing is trained again
    with pytest.raises(UserError, match=r"train\.learning_rate \(found 0\.001, expected 0\.5\)"):
        train(*sections, ARCHITECTURE, replace(parts, learning_rate=0.5), stage)

    weights_there = damaged.with_name("images-000000000096") / "model.safetensors"
    weights_there.write_bytes(weights_there.read_bytes()[:-1] + b"\0")
    fallback = newest_checkpoint(str(tmp_path / "parts"))
    assert fallback is not None
    assert fallback.endswith("images-000000000048")


def test_a_damaged_shard_ends_the_run_before_its_first_checkpoint(
    sections: tuple[str, CacheSettings], stage: Stage, tmp_path: Path
) -> None:
    shutil.copytree(sections[1].path, tmp_path / "cache")
    tokenizer, settings = sections[0], replace(sections[1], path=str(tmp_path / "cache"))
    shard = tmp_path / "cache" / "shards" / "shard-00001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    recipe = replace(RECIPE, path=str(tmp_path / "run"), images=32, checkpoint_images=16)
    with pytest.raises(UserError) as told:
        guarded("train", recipe.path, lambda: train(tokenizer, settings, ARCHITECTURE, recipe, stage))
    assert told.value.text.startswith(
        f"shard-00001.arrow of {settings.path} is damaged: SHA-256 {storage.digest(bytes(data))[:12]}…, expected"
    )
    assert "run `mar cache` with the same settings to make these shards again" in told.value.remedy
    assert newest_checkpoint(recipe.path) is None
    with pytest.raises(UserError, match=r"1 of the 3 shards of .* are damaged \(shard-00001\.arrow\)"):
        train(tokenizer, settings, ARCHITECTURE, recipe, stage)
    cache(Images(ImageSettings(source=str(Path(tokenizer).parent / "images"), size=16)), tokenizer, settings, stage)
    assert LatentCache(settings.path).digest == LatentCache(sections[1].path).digest
    assert train(tokenizer, settings, ARCHITECTURE, recipe, stage)["images_seen"] == 32


def test_every_image_once_an_epoch_whatever_the_workers(sections: tuple[str, CacheSettings]) -> None:
    cache_ = LatentCache(sections[1].path)
    config = model_config(ARCHITECTURE, cache_)

    def labels_and_noise(workers: int) -> list[torch.Tensor]:
        shares = [
            MicroBatches(cache_, config, batch=20, micro_batch=4, flip=True, seed=5, worker=worker, workers=workers)
            for worker in range(workers)
        ]
        return [one.posterior_noise for begin in (0, 20) for share in shares for one in share.prepare(begin).micro_batches]

    assert all(torch.equal(a, b) for a, b in zip(labels_and_noise(1), labels_and_noise(3), strict=True))
    order = MicroBatches(cache_, config, batch=20, micro_batch=4, flip=True, seed=5, worker=0, workers=1).latents.order
    assert sorted(order.indices(0, 40).tolist()) == list(range(40))
    assert [list(share_of(worker, 3, 5)) for worker in range(3)] == [[0], [1, 2], [3, 4]]


def test_the_documented_loader_draws_what_training_draws(sections: tuple[str, CacheSettings]) -> None:
    cache_ = LatentCache(sections[1].path)
    trained = MicroBatches(cache_, model_config(ARCHITECTURE, cache_), batch=20, micro_batch=4, flip=True, seed=5, worker=1, workers=2)
    documented = LatentDataset(cache_, seed=5).batches(20, 20, micro_batch=4, worker=1, workers=2)
    for share, batch in zip(trained.from_images(20), islice(documented, 3), strict=False):
        assert batch.position == share.images_seen
        assert torch.equal(torch.cat([one.moments for one in share.micro_batches]), batch.moments)
        assert torch.equal(torch.cat([one.labels for one in share.micro_batches]), batch.labels)
    with pytest.raises(ValueError, match="batch is 20, expected a multiple of micro_batch, which is 3"):
        next(LatentDataset(cache_, seed=5).batches(0, 20, micro_batch=3))


def test_what_cannot_be_is_said_before_any_work(sections: tuple[str, CacheSettings], stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.workers 3: 3 workers.*the cluster has 2 CPUs"):
        train(*sections, ARCHITECTURE, replace(RECIPE, path=str(tmp_path), workers=3), stage)
    with pytest.raises(UserError, match="only 4 micro-batches"):
        train(*sections, ARCHITECTURE, replace(RECIPE, path=str(tmp_path), workers=5), stage)
    with pytest.raises(UserError, match=r"keep_best is 'validation_fid', expected one of loss, .* if train\.validation_images is set"):
        train(*sections, ARCHITECTURE, replace(RECIPE, path=str(tmp_path), keep_best="validation_fid"), stage)


def test_blocks_are_compiled_when_asked_for(sections: tuple[str, CacheSettings]) -> None:
    config = model_config(ARCHITECTURE, LatentCache(sections[1].path))
    plain, compiled = (
        initial_model(config, RECIPE, 3),
        initial_model(config, replace(RECIPE, compile=True, activation_checkpointing=True), 3),
    )
    assert plain.encoder_blocks[0]._compiled_call_impl is None
    assert not plain.recompute
    for block in (compiled.encoder_blocks[0], compiled.decoder_blocks[0], compiled.diffloss.net.res_blocks[0]):
        assert block._compiled_call_impl is not None
    assert compiled.recompute
    assert compiled.diffloss.net.recompute
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), compiled.parameters(), strict=True))
