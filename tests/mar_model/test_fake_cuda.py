"""The GPU's path on a machine without one: no tensor is left on the host, and the host never waits for the device where it must not.

Each test runs on a fake CUDA device (`fake_cuda.py`), on which an operation with tensors of both devices raises an error, as does
whatever reads a value. The first tests show that a deliberate mistake is found.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn import generate
from fake_cuda import CUDA, FakeCuda, FakeReducer, Waited, fake_cuda, without_backward
from tiny_model import TINY, TOKENS, latents
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

from mar_model import MAR, SampleNoise, TokenSampler
from mar_model.head.diffusion import TokenLoss
from mar_model.tokenizers import KLAutoencoder, KLConfig, PixelTokenizer, sample_posterior
from mar_model.training.ema import WeightAverage
from mar_model.training.recipe import micro_batch_draws, parameter_groups
from mar_model.training.step import OptimizerStep, Outcome, forward_backward
from mar_model.training.strategies import Replicated, Strategy, strategy_of
from pipelines.training.metrics.intervals import Interval

MASKED = 11
NAMES = [name for name, _ in MAR(TINY).named_parameters()]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as mode:
        yield mode


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of two, of which the other is not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def model_there() -> MAR:
    with torch.device(CUDA):
        return MAR(TINY)


def step(cuda: FakeCuda, patch: pytest.MonkeyPatch, strategy: Strategy, model: MAR, precision: str = "bf16", workers: int = 1) -> Outcome:
    """A training step as the worker runs it: two micro-batches, the optimizer, and what became of it."""
    without_backward(patch, model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.02), lr=1e-4, fused=True)
    averages = [WeightAverage(model, decay, warmup=True) for decay in (0.9, 0.99)]
    optimizer_step = OptimizerStep(model, optimizer, averages, strategy, 3.0, micro_batches=2, workers=workers, requests=2)
    interval, there = Interval(CUDA), torch.empty(3, 2, 8, 8, device=CUDA)
    with cuda.must_not_wait():
        unsound = torch.zeros(2, device=CUDA)
        for index in range(2):
            draws, seed = micro_batch_draws(TINY, 3, MASKED, seed=0, images_seen=0, micro_batch=index)
            with strategy.micro_batch(last=index == 1):
                loss, timesteps, finite = forward_backward(
                    strategy.module, there, torch.tensor([0, 2, 4]), MASKED, draws, seed, 1e-3,
                    torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"),
                )  # fmt: skip
            assert (loss.total.device, loss.total.dtype, loss.total.shape) == (CUDA, torch.float32, (4 * 3 * MASKED,))
            interval.add(loss, timesteps, finite)
            unsound[index] = finite.logical_not().float()
        optimizer_step(unsound, [False, True])
        interval.steps(6, optimizer_step.norm, optimizer_step.stepped, 1e-4)
        outcome = optimizer_step.settle(0)
    assert optimizer_step.norm.device == CUDA
    assert outcome is not None
    return outcome


class Reading(nn.Module):
    """A model that does something with its loss in the midst of the step."""

    def __init__(self, model: MAR, mistake: Any) -> None:
        super().__init__()
        self.model, self.mistake = model, mistake

    def forward(self, *arguments: Any, **options: Any) -> tuple[TokenLoss, Tensor]:
        loss, timesteps = self.model(*arguments, **options)
        self.mistake(loss.total)
        return loss, timesteps


MISTAKES = {
    "item": (lambda loss: loss.mean().item(), DataDependentOutputException),
    "condition": (lambda loss: bool((loss > 0).all()), DataDependentOutputException),
    "nonzero": (lambda loss: loss.nonzero(), DynamicOutputShapeException),
    "Boolean index": (lambda loss: loss[loss > 0], DynamicOutputShapeException),
    "to the host": (lambda loss: loss.cpu(), Waited),
    "from the host": (lambda loss: torch.ones(3).to(loss.device), Waited),
    "left on the host": (lambda loss: loss + torch.ones(len(loss)), RuntimeError),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_deliberate_mistake_in_the_step_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mistake, error = MISTAKES[name]
    model = model_there()
    strategy = Replicated(model, workers=1)
    strategy.module = Reading(model, mistake)
    with pytest.raises(error):
        step(cuda, monkeypatch, strategy, model)


def test_a_parameter_left_on_the_host_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_there()
    model.mask_token = nn.Parameter(torch.zeros(1, 1, TINY.decoder_width))
    with pytest.raises(RuntimeError, match="cpu"):
        step(cuda, monkeypatch, Replicated(model, workers=1), model)


@pytest.mark.parametrize(("precision", "recompute"), [("bf16", False), ("bf16", True), ("float32", False)])
def test_training_step(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, precision: str, recompute: bool) -> None:
    model = model_there().train()
    if recompute:
        model.recompute_activations()
    outcome = step(cuda, monkeypatch, Replicated(model, workers=1), model, precision)
    assert outcome == Outcome(True, [0, 1], NAMES[1], [True, True])  # what the fake device says: all ones


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_training_step_of_several_workers(group: None, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for check in ("_verify_param_shape_across_processes", "_sync_module_states"):  # of DDP's start: they read values
        monkeypatch.setattr(ddp, check, lambda *_, **__: None)
    model = model_there().train()
    strategy = strategy_of(name, model, 2, CUDA, "bf16")  # type: ignore[arg-type]
    if isinstance(strategy.module, DistributedDataParallel):
        strategy.module.reducer = FakeReducer()
    assert step(cuda, monkeypatch, strategy, model, workers=2).stepped


class StrictNoise(SampleNoise):
    """From its first noise on, inside the first AR step, the host must not wait."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(3, [0, 1, 2], CUDA)
        self.cuda = cuda

    def tokens(self, *arguments: Any) -> Tensor:
        self.cuda.strict = True
        return super().tokens(*arguments)


RANGE = torch.full((2,), -3.0), torch.full((2,), 3.0)
SAMPLERS: dict[str, dict[str, Any]] = {
    "published": {"guidance": 3.0},
    "without guidance": {},
    "constant guidance, limited": {"guidance": 3.0, "guidance_schedule": "constant", "x0_range": RANGE, "temperature": 0.9},
    "ddim": {"guidance": 3.0, "sampler": "ddim", "eta": 0.5, "x0_range": RANGE},
    "annealed": {"guidance": 3.0, "diffusion_steps_end": 1},
    "reuse": {"guidance": 3.0, "reuse_steps": 9},
    "reuse without guidance": {"reuse_steps": 9},
    "interval": {"guidance": 3.0, "guidance_interval": (0.3, 0.7)},
    "all fast modes": {"guidance": 3.0, "diffusion_steps_end": 1, "reuse_steps": 9, "guidance_interval": (0.3, 0.7)},
}


@pytest.mark.parametrize(
    ("name", "sampler"),
    [*((name, "plain") for name in SAMPLERS), ("published", "bf16 weights"), *((name, "graph") for name in ("ddim", "all fast modes"))],
)
def test_generation(cuda: FakeCuda, name: str, sampler: str) -> None:
    model, seen = model_there().eval(), []
    token_sampler = {
        "plain": lambda: None,
        "bf16 weights": lambda: TokenSampler(model.diffloss.net, dtype=torch.bfloat16),
        "graph": lambda: TokenSampler(model.diffloss.net, dtype=torch.bfloat16, cuda_graph=True),
    }[sampler]()
    with torch.autocast("cuda", torch.bfloat16):
        drawn = generate(
            model, torch.tensor([0, 2, 4]), StrictNoise(cuda), ar_steps=3, diffusion_steps=2, token_sampler=token_sampler,
            after_step=lambda index, latents: seen.append((index, latents.device)), **SAMPLERS[name],
        )  # fmt: skip
    assert (drawn.device, drawn.shape, drawn.dtype) == (CUDA, (3, 2, 8, 8), torch.float32)
    assert cuda.strict
    assert seen == [(index, CUDA) for index in range(3)]


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "reuse_steps": 9}])
@pytest.mark.parametrize("there", [False, True])
def test_completion(cuda: FakeCuda, options: dict[str, Any], there: bool) -> None:
    """Of latents on the host; on the device their values cannot be checked beforehand without waiting, which is before the first step."""
    fill = torch.zeros(3, TOKENS, dtype=torch.bool)
    fill[:, 3:12] = True
    if there:
        with pytest.raises(DataDependentOutputException):
            generate(model_there(), torch.tensor([0, 2, 4]), StrictNoise(cuda), known=torch.empty(3, 2, 8, 8, device=CUDA), fill=fill)
        assert not cuda.strict
        return
    drawn = generate(
        model_there(), torch.tensor([0, 2, 4]), StrictNoise(cuda), ar_steps=4, diffusion_steps=3, known=latents(3), fill=fill, **options
    )
    assert (drawn.device, drawn.shape) == (CUDA, (3, 2, 8, 8))
    assert cuda.strict


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_tokenizers(cuda: FakeCuda, precision: str) -> None:
    with torch.device(CUDA):
        autoencoder = KLAutoencoder(KLConfig(channels=4, width=32, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1)).eval()
    images = torch.empty(2, 3, 16, 16, device=CUDA)
    with cuda.must_not_wait(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        for tokenizer in (autoencoder, PixelTokenizer()):
            moments = tokenizer.encode(images)
            noise = torch.empty(2, tokenizer.channels, 16 // tokenizer.stride, 16 // tokenizer.stride, device=CUDA)
            drawn = sample_posterior(moments.float(), noise)
            assert (drawn.device, drawn.shape) == (CUDA, noise.shape)
            assert (tokenizer.decode(drawn).device, tokenizer.decode(drawn).shape) == (CUDA, images.shape)


def test_the_host_may_not_wait_inside_an_ar_step(cuda: FakeCuda) -> None:
    class Blocking(StrictNoise):
        def tokens(self, *arguments: Any) -> Tensor:
            return super().tokens(*arguments).cpu().to(CUDA)

    with pytest.raises(Waited):
        generate(model_there(), torch.tensor([0, 2, 4]), Blocking(cuda), ar_steps=4, diffusion_steps=3)
