"""The fast modes: neutral settings change no bit, and each mode leaves out the work it says it leaves out."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from drawn import generate
from tiny_model import TINY, TOKENS, latents, tiny_model
from torch import Tensor, nn

from mar_model import MAR, SampleNoise
from mar_model.head.diffusion import Diffusion, annealed_steps, respaced_timesteps
from mar_model.masking import mask_schedule
from mar_model.noise import stream
from mar_model.sampling.feature_reuse import FeatureReuse
from mar_model.sampling.token_sampler import Sampling, TokenSampler, draw_tokens

FEW = {"ar_steps": 4, "diffusion_steps": 6, "x0_range": (torch.full((2,), -3.0), torch.full((2,), 3.0))}
LABELS = torch.tensor([0, 2, 4])


@pytest.fixture(scope="module")
def model() -> MAR:
    return tiny_model()


def drawn(model: MAR, **options: Any) -> Tensor:
    return generate(model, LABELS, SampleNoise(3, [0, 1, 2]), **{**FEW, "guidance": 3.0, **options})


@contextmanager
def rows_through(module: nn.Module) -> Iterator[list[int]]:
    """The rows that each call of `module` computes."""
    rows: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2).shape[0]))
    yield rows
    hook.remove()


def drawn_at_each_step() -> list[int]:
    return [before - after for before, after in itertools.pairwise(mask_schedule(TOKENS, 4))]


NEUTRAL = {"diffusion_steps_end": FEW["diffusion_steps"], "guidance_interval": (0.0, 1.0), "reuse_steps": 0}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_setting_changes_no_bit(model: MAR, name: str) -> None:
    assert torch.equal(drawn(model, **{name: NEUTRAL[name]}), drawn(model))


def test_annealed_steps_fall_linearly() -> None:
    assert annealed_steps(50, 5, 10) == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert annealed_steps(50, 5, 64)[::21] == [50, 35, 20, 5]
    assert annealed_steps(7, 7, 3) == [7, 7, 7]
    assert annealed_steps(9, 1, 1) == [9]
    for end in (0, 51):
        with pytest.raises(ValueError, match=f"diffusion_steps_end is {end}, expected 1 to diffusion_steps, which is 50"):
            annealed_steps(50, end, 10)


def test_annealing_calls_the_denoiser_less_often_and_takes_the_first_noise(model: MAR) -> None:
    with rows_through(model.diffloss.net.res_blocks[0]) as rows:
        drawn(model, diffusion_steps_end=3)
    expected = [2 * 3 * count for steps, count in zip([6, 5, 4, 3], drawn_at_each_step(), strict=True) for _ in range(steps)]
    assert rows == expected

    class Ending(SampleNoise):
        def tokens(self, step: int, *arguments: Any) -> Tensor:
            noise = super().tokens(step, *arguments)
            return noise.index_fill(0, torch.arange(1 + [6, 5, 4, 3][step], 7), torch.nan)

    found = generate(model, LABELS, Ending(3, [0, 1, 2]), **FEW, guidance=3.0, diffusion_steps_end=3)
    assert torch.equal(found, drawn(model, diffusion_steps_end=3))
    assert not torch.equal(found, drawn(model))


def test_outside_the_interval_the_unconditional_half_is_not_computed(model: MAR) -> None:
    visited = respaced_timesteps(6)  # 0, 200, 400, 599, 799, 999
    with rows_through(model.diffloss.net.res_blocks[0]) as rows:
        drawn(model, guidance_interval=(0.3, 0.7))
    halves = [2 if 0.3 <= timestep / 999 <= 0.7 else 1 for timestep in reversed(visited)]
    assert rows == [3 * count * half for count in drawn_at_each_step() for half in halves]
    assert halves == [1, 1, 2, 2, 1, 1]
    with rows_through(model.decoder_blocks[0]) as transformer, rows_through(model.diffloss.net.res_blocks[0]) as rows:
        nowhere = drawn(model, guidance_interval=(0.45, 0.55))
    assert transformer == [3 * (TINY.buffer_size + TOKENS)] * 4
    assert rows == [3 * count for count in drawn_at_each_step() for _ in visited]
    assert torch.equal(nowhere, drawn(model, guidance=1.0))


def test_guidance_in_a_part_is_the_two_samplers_in_turn(model: MAR) -> None:
    """Guided above 0.5, conditional below: half a guided trajectory, continued by an unguided one."""
    denoiser, diffusion = model.diffloss.net, Diffusion(respaced_timesteps(6))
    z, noise = (torch.randn(*shape, generator=stream(0, "z")) for shape in ((8, 48), (7, 4, 8)))
    found = draw_tokens(denoiser, diffusion, z, noise, Sampling(guidance_interval=(0.5, 1.0)), guidance=2.0)
    x = noise[0]
    with torch.no_grad():
        for index in reversed(range(6)):
            outputs = [denoiser(x, diffusion.timesteps[index].expand(4), half).chunk(2, dim=1) for half in z.chunk(2)]
            (conditional, interpolation), (unconditional, _) = outputs
            predicted = unconditional + 2.0 * (conditional - unconditional) if index >= 3 else conditional
            x = diffusion.step(x, index, predicted, interpolation, noise[6 - index])
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def conditions(model: MAR, tokens: Tensor, kept: Tensor, embedding: Tensor) -> Tensor:
    copies = embedding.shape[0] // tokens.shape[0]
    kept = kept.repeat(copies, 1)
    return model.decode(model.encode(tokens.repeat(copies, 1, 1), kept, embedding), kept)


@torch.no_grad()
def test_features_are_those_of_the_model_when_complete_and_as_long_as_nothing_changes(model: MAR) -> None:
    tokens, embedding = model.patchify(latents(2)), torch.randn(4, 32, generator=stream(0, "embedding"))
    kept = torch.tensor([[1, 4, 7, 9], [0, 2, 3, 15]])
    expected = conditions(model, tokens, kept, embedding)
    reuse = FeatureReuse(model, embedding, 2, ar_steps=10, reuse_steps=100)
    first = torch.tensor([[5, 6], [8, 9]])
    for step in range(3):  # 30 % of 10 steps are complete
        found = reuse.conditions(step, tokens, kept, first)
        torch.testing.assert_close(found, expected.gather(1, first.repeat(2, 1)[:, :, None].expand(-1, -1, 48)), rtol=1e-4, atol=1e-4)
    reuse._drawn_before = kept[:, :1]  # nothing new is known: what is computed anew is what was there
    later = torch.tensor([[0, 2, 3], [5, 6, 7]])
    found = reuse.conditions(3, tokens, kept, later)
    torch.testing.assert_close(found, expected.gather(1, later.repeat(2, 1)[:, :, None].expand(-1, -1, 48)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_was_just_drawn_is_seen_at_once_and_the_rest_is_as_it_was(model: MAR) -> None:
    tokens, embedding = model.patchify(latents(1)), torch.randn(1, 32, generator=stream(0, "embedding"))
    asked = torch.tensor([[2, 3]])
    found = []
    for change in (0.0, 1.0):
        reuse = FeatureReuse(model, embedding, 1, ar_steps=1, reuse_steps=5)
        reuse.conditions(0, tokens, torch.tensor([[1, 4]]), torch.tensor([[8, 9]]))
        changed = tokens.clone()
        changed[0, 8] += change  # drawn at step 0
        found.append(reuse.conditions(1, changed, torch.tensor([[1, 4, 8, 9]]), asked))
    before, exact = (conditions(model, tokens, torch.tensor([kept]), embedding)[:, 2:4] for kept in ([1, 4], [1, 4, 8, 9]))
    assert float((found[0] - found[1]).abs().max()) > 1e-2
    assert 0 < float((found[0] - exact).norm()) < float((before - exact).norm())  # nearer than what was there


def test_reuse_computes_few_positions(model: MAR) -> None:
    steps, buffer = drawn_at_each_step(), TINY.buffer_size
    with rows_through(model.encoder_blocks[1].mlp) as encoder, rows_through(model.decoder_blocks[1].mlp) as decoder:
        found = drawn(model, reuse_steps=9)  # complete: the first two of four
    known = [0, *itertools.accumulate(steps)]
    assert decoder == [3 * (buffer + TOKENS)] * 4 + [3 * (buffer + steps[step - 1] + steps[step]) for step in (2, 3)]
    assert encoder == [3 * (buffer + known[step]) for step in (0, 0, 1, 1)] + [3 * (buffer + steps[step - 1]) for step in (2, 3)]
    assert not torch.equal(found, drawn(model))
    alone = generate(model, LABELS[1:2], SampleNoise(3, [1]), **FEW, guidance=3.0, reuse_steps=9)
    torch.testing.assert_close(found[1:2], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"guidance_interval": (0.3, 0.7), "diffusion_steps_end": 3, "sampler": "ddim", "eta": 1.0}])
def test_a_static_loop_draws_the_same(model: MAR, options: dict[str, Any]) -> None:
    """What a CUDA graph replays: buffers of its own, filled anew at each call; kept from batch to batch."""
    sampler = TokenSampler(model.diffloss.net, cuda_graph=True)
    for _ in range(2):
        assert torch.equal(drawn(model, token_sampler=sampler, **options), drawn(model, **options))
    assert torch.equal(drawn(model, token_sampler=sampler, **options, guidance=1.5), drawn(model, **options, guidance=1.5))
    steps = annealed_steps(6, options.get("diffusion_steps_end", 6), 4)
    assert len(sampler._loops) == len(set(zip(drawn_at_each_step(), steps, strict=True)))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="set the dtype of TokenSampler instead"):
        drawn(model, token_sampler=sampler)


def test_weights_in_bf16_draw_what_autocast_draws(model: MAR) -> None:
    exact = drawn(model)
    copied = drawn(model, token_sampler=TokenSampler(model.diffloss.net, dtype=torch.bfloat16))
    assert copied.dtype == torch.float32
    assert 0 < float((copied - exact).abs().mean()) < 0.05
    assert model.diffloss.net.input_proj.weight.dtype == torch.float32
