"""The optimizer's step: AdamW and averages as torch alone gives them, clipped; nothing moves in a step that is not finite."""

import torch
from torch import nn

from mar_model.training.ema import WeightAverage
from mar_model.training.step import OptimizerStep
from mar_model.training.strategies import Replicated

CLIP = 0.5


class OneMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.zeros(3))

    def backward(self, scale: float) -> None:
        ((self.weight.square().sum() + self.bias.sum()) * scale).backward()


def make() -> tuple[OneMatrix, torch.optim.Optimizer, list[WeightAverage], OptimizerStep]:
    model = OneMatrix()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    averages = [WeightAverage(model, decay, warmup=False) for decay in (0.9, 0.5)]
    strategy = Replicated(model, workers=1)  # type: ignore[arg-type]
    return model, optimizer, averages, OptimizerStep(model, optimizer, averages, strategy, CLIP, micro_batches=2, workers=1, requests=1)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, averages: list[WeightAverage]) -> list[torch.Tensor]:
    states = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [one.detach().clone() for one in (*model.parameters(), *states, *(value for one in averages for value in one.weights.values()))]


def test_as_clip_grad_norm_and_adamw_of_torch() -> None:
    model, _, averages, step = make()
    plain = OneMatrix()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    expected = {name: value.detach().clone() for name, value in plain.named_parameters()}
    for scale in (1.0, 0.001, 3.0):  # clipped, below the largest norm, clipped
        model.backward(scale)
        step(torch.zeros(2), [scale == 0.001])
        plain.backward(scale)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(step.norm, norm)
        outcome = step.settle(0)
        assert outcome is not None
        assert (outcome.stepped, outcome.losses, outcome.gradient, outcome.requests) == (True, [], "", [scale == 0.001])
        for name, value in plain.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-5, atol=1e-6)
            expected[name] = 0.5 * expected[name] + 0.5 * value.detach()
            torch.testing.assert_close(averages[1].weights[name], expected[name], rtol=1e-5, atol=1e-6)
    assert step.settle(0) is None  # once


def test_a_gradient_or_loss_that_is_not_finite_moves_nothing_and_is_named() -> None:
    model, optimizer, averages, step = make()
    model.backward(1.0)
    step(torch.zeros(2), [False])
    step.settle(0)
    before = everything(model, optimizer, averages)

    model.backward(1.0)
    assert model.bias.grad is not None
    model.bias.grad[1] = float("inf")
    step(torch.zeros(2), [False])
    outcome = step.settle(1)
    assert outcome is not None
    assert (outcome.stepped, outcome.losses, outcome.gradient) == (False, [], "bias")

    model.backward(1.0)  # a loss may be infinite where its gradient is not
    step(torch.tensor([0.0, 1.0]), [True])
    outcome = step.settle(1)
    assert outcome is not None
    assert (outcome.stepped, outcome.losses, outcome.requests) == (False, [1], [True])
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer, averages), strict=True))

    model.backward(1.0)
    step(torch.zeros(2), [False])
    assert step.settle(1) is not None
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer, averages), strict=True))
