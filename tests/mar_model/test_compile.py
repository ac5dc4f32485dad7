"""`torch.compile` on the blocks: the same numbers, and no new code for other masks, AR steps and batches.

What is counted is what the compiler is given to compile; the backend that runs it as it stands needs no C++ compiler and
is quick.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from drawn import generate
from torch import Tensor, nn

from mar_model import MAR, MARConfig, SampleNoise, TokenSampler
from mar_model.masking import draw_mask_ratio, masked_tokens
from mar_model.noise import stream
from mar_model.training.recipe import micro_batch_draws

TINY = MARConfig(
    encoder_depth=3, encoder_width=32, encoder_heads=2, decoder_depth=3, decoder_width=32, decoder_heads=2, buffer_size=3,
    denoiser_depth=3, denoiser_width=40, latent_size=8, latent_channels=2, patch_size=2, classes=5, attention_dropout=0.0,
    projection_dropout=0.0,
)  # fmt: skip


def model() -> MAR:
    torch.manual_seed(0)
    made = MAR(TINY)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def compiled() -> Iterator[MAR]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = model()
    made.compile_blocks(backend="eager")
    yield made
    torch._dynamo.reset()


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def losses(made: MAR, masked: int, images: int = 3) -> Tensor:
    draws, _ = micro_batch_draws(TINY, images, masked, seed=0, images_seen=masked, micro_batch=0)
    latents = torch.linspace(-1, 1, images * 128).view(images, 2, 8, 8)
    return made(latents, torch.arange(images), masked, draws)[0].total


def test_training_compiles_once_for_all_masks(compiled: MAR) -> None:
    plain = model()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for masked in (11, 12, 16, 9):
        for made in (plain, compiled):
            made.zero_grad()
            losses(made, masked).mean().backward()
        torch.testing.assert_close(losses(compiled, masked), losses(plain, masked))
        for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert graphs() == 3  # a block, the last decoder block, a denoiser's block
    losses(compiled, 10, images=5)
    assert graphs() == 3


RATIOS, GRAPHS = 200, 3  # docs/training.md: a block, the last decoder block, a block of the denoiser


def test_200_steps_of_random_mask_ratios_compile_three_graphs(compiled: MAR) -> None:
    """As in training, forward and backward: the ratio changes from step to step, and nothing is compiled again."""
    made, plain = compiled, model()
    made.compile_blocks(backend="aot_eager")
    lengths: list[int] = []
    for step in range(RATIOS):
        masked = masked_tokens(TINY.tokens, draw_mask_ratio(stream(0, step), 1.0, 0.25, 0.1))
        lengths.append(masked)
        made.zero_grad()
        losses(made, masked).mean().backward()
        assert graphs() <= GRAPHS, lengths
    assert len(set(lengths)) >= 12
    assert max(lengths) == TINY.tokens  # then the encoder sees the buffer alone
    assert graphs() == torch._dynamo.utils.counters["aot_autograd"]["ok"] == GRAPHS
    plain.zero_grad()
    losses(plain, lengths[-1]).mean().backward()
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_decoder_of_another_width_takes_a_graph_of_its_own() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = replace(TINY, decoder_width=48, decoder_heads=3)
    made = MAR(config)
    made.compile_blocks(backend="eager")
    for masked in (11, 9, 16):
        losses(made, masked)
    assert graphs() == GRAPHS + 1
    torch._dynamo.reset()


def test_generation_compiles_nothing_after_its_first_step(compiled: MAR) -> None:
    labels, after_each = torch.tensor([0, 3, 4]), []

    def draw(made: MAR, seed: int, **options: float) -> Tensor:
        return generate(
            made, labels, SampleNoise(seed, [0, 1, 2]), ar_steps=6, diffusion_steps=4, guidance=2.0, **options,
            after_step=lambda step, latents: after_each.append(graphs()),
        )  # fmt: skip

    found = draw(compiled.eval(), 0)
    assert after_each[-1] <= 4  # the three of training, and one of them anew for steps that draw a single token
    assert after_each[1] == after_each[-1]
    first = after_each[-1]
    torch.testing.assert_close(found, draw(model().eval(), 0), rtol=1e-3, atol=1e-3)
    draw(compiled, 1)
    draw(compiled, 2, temperature=0.9)
    assert graphs() == first


def test_blocks_that_reuse_features_are_compiled_too(compiled: MAR) -> None:
    after_each: list[int] = []

    def draw(made: MAR, seed: int) -> Tensor:
        return generate(
            made.eval(), torch.tensor([0, 3]), SampleNoise(seed, [0, 1]), ar_steps=12, diffusion_steps=3, guidance=2.0, reuse_steps=2,
            after_step=lambda step, latents: after_each.append(graphs()),
        )  # fmt: skip

    torch.testing.assert_close(draw(compiled, 0), draw(model(), 0), rtol=1e-3, atol=1e-3)
    assert after_each[0] == 4  # the unconditional half's block, the denoiser's, and two that keep features: encoder and decoder
    assert after_each[-1] <= 5
    draw(compiled, 1)
    assert graphs() == after_each[-1]


def test_weights_copied_in_bf16_are_compiled_with_the_same_backend(compiled: MAR) -> None:
    sampler = TokenSampler(compiled.diffloss.net, dtype=torch.bfloat16)
    labels, noise = torch.tensor([0, 3]), SampleNoise(0, [0, 1])
    generate(compiled.eval(), labels, noise, ar_steps=3, diffusion_steps=3, token_sampler=sampler)
    assert graphs() >= 3  # the transformer's blocks, and the denoiser's
    assert not torch._dynamo.utils.counters["inductor"]


def test_activations_can_be_recomputed_in_compiled_blocks(compiled: MAR) -> None:
    plain = model()
    compiled.recompute_activations()
    for made in (plain, compiled):
        losses(made, 11).mean().backward()
    for one, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
