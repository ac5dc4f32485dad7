"""Generation beyond the records: given orders, no labels, completion, what does not depend on the batch, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn import generate
from tiny_model import TINY, TOKENS, latents, tiny_model
from torch import Tensor

from mar_model import MAR, SampleNoise
from mar_model.masking import mask_schedule

BOUNDS = torch.full((2,), -3.0), torch.full((2,), 3.0)
FEW = {"ar_steps": 4, "diffusion_steps": 6, "x0_range": BOUNDS}


@pytest.fixture(scope="module")
def model() -> MAR:
    return tiny_model()


def cells(*filled: int, images: int = 1) -> Tensor:
    fill = torch.zeros(images, TOKENS, dtype=torch.bool)
    fill[:, list(filled)] = True
    return fill


def test_given_orders_are_those_of_the_noise(model: MAR) -> None:
    labels, noise = torch.tensor([1, 4]), SampleNoise(3, [0, 1])
    expected = generate(model, labels, noise, **FEW)
    assert torch.equal(generate(model, labels, noise, **FEW, orders=noise.orders(TOKENS)), expected)
    other = generate(model, labels, noise, **FEW, orders=noise.orders(TOKENS).flip(1))
    assert float((other - expected).abs().max()) > 0.1


def test_without_labels_every_image_has_the_unconditional_vector(model: MAR) -> None:
    noise = SampleNoise(3, [0, 1, 2])
    unconditional = generate(model, None, noise, **FEW)
    blind = MAR(TINY)
    blind.load_state_dict({**model.state_dict(), "class_emb.weight": model.fake_latent.detach().expand(5, -1)})
    torch.testing.assert_close(generate(blind, torch.tensor([0, 3, 4]), noise, **FEW), unconditional)
    assert float((generate(model, torch.tensor([0, 3, 4]), noise, **FEW) - unconditional).abs().max()) > 0.01


def test_completion_draws_what_is_to_be_filled_and_keeps_the_rest_bit_for_bit(model: MAR) -> None:
    known, fill = latents(2), cells(0, 1, 5, 6, 7, images=2)
    seen: list[Tensor] = []
    found = generate(
        model, torch.tensor([0, 2]), SampleNoise(3, [0, 1]), **FEW, guidance=2.0, known=known, fill=fill,
        after_step=lambda step, picture: seen.append(model.patchify(picture)),
    )  # fmt: skip
    before, after = model.patchify(known), model.patchify(found)
    assert torch.equal(after[~fill], before[~fill])
    assert (after[fill] != before[fill]).any(dim=1).all()
    assert torch.equal(known, latents(2))  # the caller's own
    left = mask_schedule(5, 4)[1:]
    assert [int((picture == 0).all(dim=2).sum()) for picture in seen] == [2 * one for one in left]
    assert torch.equal(seen[-1], after)
    by_grid = generate(model, torch.tensor([0, 2]), SampleNoise(3, [0, 1]), **FEW, guidance=2.0, known=known, fill=fill.view(2, 4, 4))
    assert torch.equal(by_grid, found)


def test_what_is_known_counts(model: MAR) -> None:
    one, other = (
        generate(model, torch.tensor([0]), SampleNoise(3, [0]), **FEW, known=known, fill=cells(3))
        for known in (latents(1), latents(1).flip(2))
    )
    tokens = [model.patchify(picture)[0, 3] for picture in (one, other)]
    assert float((tokens[0] - tokens[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("ar_steps", [3, 16, 40])
def test_completion_of_everything_is_plain_generation(model: MAR, ar_steps: int) -> None:
    options: dict[str, Any] = {**FEW, "ar_steps": ar_steps, "guidance": 3.0}
    plain = generate(model, torch.tensor([0, 2]), SampleNoise(3, [0, 1]), **options)
    everything = torch.ones(2, TOKENS, dtype=torch.bool)
    assert torch.equal(generate(model, torch.tensor([0, 2]), SampleNoise(3, [0, 1]), **options, known=latents(2), fill=everything), plain)


def test_the_picture_so_far_is_the_callers_to_keep(model: MAR) -> None:
    pictures: dict[int, Tensor] = {}
    whole = generate(model, torch.tensor([0]), SampleNoise(3, [0]), **FEW, after_step=pictures.__setitem__)
    lengths = mask_schedule(TOKENS, 4)
    assert list(pictures) == [0, 1, 2, 3]
    for step, picture in pictures.items():
        tokens = model.patchify(picture)[0]
        there = (tokens != 0).all(dim=1)
        assert int(there.sum()) == TOKENS - lengths[step + 1]
        assert torch.equal(tokens[there], model.patchify(whole)[0, there])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [{"guidance": 2.0}, {"sampler": "ddim", "eta": 0.5}, {"known": latents(4), "fill": cells(1, 2, 3, 8, images=4)}],
    ids=["guided", "ddim", "completion"],
)
def test_a_sample_is_the_same_alone_and_in_any_batch(model: MAR, options: dict[str, Any], threads: int) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    together = generate(model, labels, SampleNoise(7, [0, 17, 203, 4]), **FEW, **options)
    assert torch.equal(generate(model, labels, SampleNoise(7, [0, 17, 203, 4]), **FEW, **options), together)
    mixed = generate(model, labels[[2, 0, 3, 1]], SampleNoise(7, [203, 0, 4, 17]), **FEW, **{
        name: value[[2, 0, 3, 1]] if isinstance(value, Tensor) else value for name, value in options.items()
    })  # fmt: skip
    if threads == 1:  # as the workers have it: at the same batch shape every bit, wherever in the batch
        assert torch.equal(mixed, together[[2, 0, 3, 1]])
    torch.testing.assert_close(mixed, together[[2, 0, 3, 1]], rtol=1e-4, atol=1e-4)
    alone = generate(model, labels[2:3], SampleNoise(7, [203]), **FEW, **{
        name: value[2:3] if isinstance(value, Tensor) else value for name, value in options.items()
    })  # fmt: skip
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)  # a pixel is 1/127.5


def test_ddim_differs_and_without_eta_takes_no_noise_but_the_initial(model: MAR) -> None:
    class Louder(SampleNoise):
        def tokens(self, *arguments: Any) -> Tensor:
            noise = super().tokens(*arguments)
            return torch.cat([noise[:1], 5 * noise[1:]])

    labels, options = torch.tensor([1]), {**FEW, "sampler": "ddim"}
    plain = generate(model, labels, SampleNoise(0, [0]), **options)
    assert torch.equal(generate(model, labels, Louder(0, [0]), **options), plain)
    assert not torch.equal(generate(model, labels, Louder(0, [0]), **options, eta=0.5), plain)
    assert float((generate(model, labels, SampleNoise(0, [0]), **FEW) - plain).abs().max()) > 0.01


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"labels": torch.tensor([0, 5])}, "labels range from 0 to 5, expected 0 to 4"),
    ({"labels": torch.tensor([-1, 2])}, "labels range from -1 to 2, expected 0 to 4"),
    ({"labels": torch.tensor([0.0, 1.0])}, r"dtype torch.float32, expected \(B,\) integers"),
    ({"labels": torch.tensor([0, 1, 2])}, "labels are for 3 images, the orders for 2"),
    ({"labels": None, "guidance": 2.0}, "guidance is 2.0 without labels, expected 1"),
    ({"guidance": float("nan")}, "guidance is nan, expected a finite number"),
    ({"ar_steps": 0}, "ar_steps is 0, expected 1 or more"),
    ({"diffusion_steps": 0}, "diffusion_steps is 0, expected 1 to 1000"),
    ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more"),
    ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
    ({"sampler": "euler"}, "sampler is 'euler', expected one of ancestral, ddim"),
    ({"sampler": "ddim", "eta": 1.5}, "eta is 1.5, expected 0 to 1"),
    ({"x0_range": (torch.zeros(3), torch.ones(3))}, r"x0_range has shapes \[\(3,\), \(3,\)\], expected two of \(2,\)"),
    ({"x0_range": (torch.ones(2), torch.zeros(2))}, "expected low ≤ high in every channel"),
    ({"orders": torch.zeros(2, TOKENS, dtype=torch.long)}, r"orders \[0, 1\] are not permutations of 0 to 15"),
    ({"orders": torch.arange(15).expand(2, 15)}, r"orders have shape \(2, 15\) .* expected \(B, 16\) integers"),
    ({"known": latents(2), "fill": cells(images=2)}, "fill selects no token, expected at least one"),
    ({"known": latents(2), "fill": torch.cat([cells(0), cells(1, 2)])}, "between 1 and 2 tokens to fill, expected equally many"),
    ({"known": latents(2).double(), "fill": cells(1, images=2)}, "dtype torch.float64, expected .* torch.float32"),
    ({"known": latents(3), "fill": cells(1, images=3)}, r"known has shape \(3, 2, 8, 8\) .* expected \(2, 2, 8, 8\)"),
    ({"known": latents(2).index_fill(3, torch.tensor(1), torch.nan), "fill": cells(1, images=2)}, "known contains 32 values that are NaN"),
    ({"known": latents(2), "fill": cells(1, images=2).float()}, r"dtype torch.float32, expected \(2, 16\) or \(2, 4, 4\) and torch.bool"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_drawn_is_refused_before_any_work(model: MAR, change: dict[str, Any], message: str) -> None:
    class Unused(SampleNoise):
        def tokens(self, *arguments: Any) -> Tensor:
            raise AssertionError("noise was drawn")

    request = {"labels": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        generate(model, request.pop("labels"), Unused(0, [0, 1]), **request)
