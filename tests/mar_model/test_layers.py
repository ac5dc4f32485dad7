"""The layers that are ours for speed do what PyTorch's do; nothing that reaches no result is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_model import MAR, MARConfig
from mar_model.dropout import Dropout, dropout
from mar_model.linear import SMALL, Linear
from mar_model.training.recipe import micro_batch_draws
from mar_model.transformer import Attention, Block

TINY = MARConfig(
    encoder_depth=2, encoder_width=32, encoder_heads=2, decoder_depth=2, decoder_width=48, decoder_heads=3, buffer_size=3,
    denoiser_depth=2, denoiser_width=40, latent_size=8, latent_channels=2, patch_size=2, classes=5,
)  # fmt: skip


def model(config: MARConfig = TINY) -> MAR:
    torch.manual_seed(0)
    made = MAR(config)
    for parameter in made.parameters():  # a fresh denoiser's output is zero: give every weight a say
        nn.init.normal_(parameter, std=0.1)
    return made


def test_linear_and_its_gradients_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    layer = Linear(64, 96)
    for rows in (3, SMALL // 64 + 5):  # below and above what goes to oneDNN
        x = torch.randn(2, rows, 64, requires_grad=True)
        weight, gradient = torch.randn(2, rows, 96), []
        for function in (layer, lambda x: F.linear(x.double(), layer.weight.double(), layer.bias.double())):
            output = function(x)
            gradient.append((output.detach(), *torch.autograd.grad((output * weight).sum(), (x, layer.weight, layer.bias))))
        for found, expected in zip(*gradient, strict=True):
            assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6
    assert layer(torch.randn(4, 0, 64)).shape == (4, 0, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert {name: value.shape for name, value in layer.state_dict().items()} == {"weight": (96, 64), "bias": (96,)}


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_keeps_the_share_it_says_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1000, 1001), p)
    kept = dropped != 0
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / 1e6) ** 0.5)
    assert float(dropped.mean()) == pytest.approx(float(p < 1), abs=3e-3)
    if p < 1:
        assert float(dropped[kept].min()) == float(dropped[kept].max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    for shift in (1, 2, 3, 4, 5):  # the values that one random number decides are independent of each other
        flat = kept.flatten().double()
        together = float((flat[shift:] * flat[:-shift]).mean())
        assert together == pytest.approx((1 - p) ** 2, abs=2e-3)


def test_dropout_is_repeatable_and_off_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.randn(7, 11)
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)


def test_attention_with_dropout_is_attention_on_average() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, attention_dropout=0.2, projection_dropout=0.0)
    x = torch.randn(1, 10, 16)
    with torch.no_grad():
        mean = torch.stack([attention(x) for _ in range(4000)]).mean(dim=0)
        torch.testing.assert_close(mean, attention.eval()(x), atol=0.02, rtol=0.02)
        attention.train().attention_dropout = 1e-9  # the path with dropout, dropping nothing
        torch.testing.assert_close(attention(x), attention.eval()(x))


def test_a_block_at_positions_is_the_whole_block_there() -> None:
    torch.manual_seed(0)
    block, x = Block(24, 3, 4.0, 0.1, 0.1).eval(), torch.randn(2, 9, 24)
    positions = torch.tensor([[0, 3, 8], [8, 1, 2]])
    expected = torch.stack([row[chosen] for row, chosen in zip(block(x), positions, strict=True)])
    torch.testing.assert_close(block(x, positions), expected)


@torch.no_grad()
def test_conditions_at_positions_are_those_of_all_tokens() -> None:
    made = model().eval()
    kept, positions = torch.tensor([[1, 5, 9], [0, 2, 15]]), torch.tensor([[2, 3, 4, 15], [1, 3, 4, 5]])
    encoded = made.encode(torch.randn(2, 16, 8), kept, torch.randn(2, 32))
    z = made.decode(encoded, kept)
    assert z.shape == (2, 16, 48)
    torch.testing.assert_close(made.decode(encoded, kept, positions), torch.stack([z[0, positions[0]], z[1, positions[1]]]))


def step(made: MAR, config: MARConfig) -> dict[str, Tensor]:
    """Losses and gradients of one micro-batch, dropout included."""
    draws, seed = micro_batch_draws(config, 3, 11, seed=0, images_seen=0, micro_batch=0)
    torch.manual_seed(seed)
    loss, _ = made.train()(torch.linspace(-1, 1, 3 * 128).view(3, 2, 8, 8), torch.tensor([0, 1, 2]), 11, draws)
    loss.total.mean().backward()
    return {"loss": loss.total.detach(), **{name: one.grad for name, one in made.named_parameters()}}


def test_recomputed_activations_give_the_same_losses_and_gradients() -> None:
    kept, recomputing = model(), model()
    recomputing.recompute_activations()
    saved = []
    for made in (kept, recomputing):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = step(made, TINY)
        saved.append((found, sum(sizes)))
    (expected, kept_values), (found, recomputed_values) = saved
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert recomputed_values < 0.5 * kept_values
