"""The published system's numbers, recorded from the release in float32 on small random models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mar_model import MAR, MARConfig, generate
from mar_model.checkpoint import load_weights
from mar_model.diffusion import Diffusion, respaced_timesteps
from mar_model.generate import sample_tokens

DATA = Path(__file__).parent.parent / "data"


class Record:
    """A golden record: its arguments, tensors, and the model it was made with."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as stream:
            self.arguments: dict[str, str] = stream.metadata()
        self.tensors = load_file(path)
        a = self.arguments
        self.config = MARConfig(
            patch_size=int(a["patch_size"]),
            encoder_depth=int(a["encoder_depth"]),
            encoder_width=int(a["encoder_embed_dim"]),
            encoder_heads=int(a["encoder_num_heads"]),
            decoder_depth=int(a["decoder_depth"]),
            decoder_width=int(a["decoder_embed_dim"]),
            decoder_heads=int(a["decoder_num_heads"]),
            mlp_ratio=float(a["mlp_ratio"]),
            buffer_size=int(a["buffer_size"]),
            denoiser_depth=int(a["diffloss_d"]),
            denoiser_width=int(a["diffloss_w"]),
            latent_size=int(a["img_size"]) // int(a["vae_stride"]),
            latent_channels=int(a["vae_embed_dim"]),
            classes=int(a["class_num"]),
        )
        self.model = MAR(self.config).eval()
        prefix = "model."
        load_weights(self.model, {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)})

    def kept(self) -> Tensor:
        """Positions of the unmasked tokens, (B, K) ascending."""
        mask = self.tensors["train.mask"].bool()
        return torch.stack([torch.nonzero(~row).flatten() for row in mask])


class RecordedNoise:
    """Replays a recorded generation."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def orders(self, tokens: int) -> Tensor:
        return self.record.tensors["generate.orders"]

    def tokens(self, step: int, predicted: Tensor, diffusion_steps: int, dim: int) -> Tensor:
        return self.record.tensors[f"generate.noise.{step}"]


@pytest.fixture(scope="module", params=["mar_tiny_cfg", "mar_tiny_nocfg"])
def record(request: pytest.FixtureRequest) -> Record:
    return Record(DATA / f"{request.param}.safetensors")


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_tokens_encoder_and_decoder(record: Record) -> None:
    expected = record.tensors
    labels = expected["train.labels"]
    tokens = record.model.patchify(expected["train.latents"])
    assert torch.equal(tokens, expected["train.tokens"])
    assert torch.equal(record.model.unpatchify(tokens), expected["train.latents"])
    embedding = record.model.class_embedding(labels, torch.zeros_like(labels, dtype=torch.bool))
    encoded = record.model.encode(tokens, record.kept(), embedding)
    assert relative_error(encoded, expected["train.encoded"]) < 1e-4
    assert relative_error(record.model.decode(encoded, record.kept()), expected["train.z"]) < 1e-4


@torch.no_grad()
def test_loss_of_every_token_and_over_the_masked(record: Record) -> None:
    expected = record.tensors
    tokens = expected["train.tokens"].flatten(0, 1)
    loss = record.model.diffloss(tokens, expected["train.z"].flatten(0, 1), expected["loss.t"], expected["loss.noise"])
    assert relative_error(loss.mse, expected["loss.mse"]) < 1e-4
    assert relative_error(loss.bound, expected["loss.vb"]) < 1e-4
    assert relative_error(loss.total, expected["loss.per_token"]) < 1e-4
    scalar = loss.total[expected["train.mask"].flatten().bool()].mean()
    assert float(scalar) == pytest.approx(float(expected["loss.scalar"]), rel=1e-4)


@torch.no_grad()
def test_forward_computes_the_masked_tokens_alone_and_gives_the_same_loss(record: Record) -> None:
    from mar_model import TrainingDraws

    expected = record.tensors
    mask = expected["train.mask"].bool()
    batch, length = mask.shape
    masked = int(mask[0].sum())
    assert torch.equal(torch.zeros_like(mask).scatter(1, expected["train.orders"][:, :masked], True), mask)
    draws = TrainingDraws(
        orders=expected["train.orders"],
        label_dropped=torch.zeros(batch, dtype=torch.bool),
        timesteps=expected["loss.t"].view(batch, length)[mask].view(1, batch, masked),
        noise=expected["loss.noise"].view(batch, length, -1)[mask].view(1, batch, masked, -1),
    )
    loss, _ = record.model(expected["train.latents"], expected["train.labels"], masked, draws)
    assert loss.total.shape == (batch * masked,)
    assert float(loss.total.mean()) == pytest.approx(float(expected["loss.scalar"]), rel=1e-4)


@torch.no_grad()
def test_denoiser_sampler(record: Record) -> None:
    expected, arguments = record.tensors, record.arguments
    steps = int(arguments["num_sampling_steps"])
    assert respaced_timesteps(steps) == json.loads(arguments["gen_timestep_map"])
    noise = torch.cat([expected["head.initial_noise"][None], expected["head.step_noise"]])
    scale = float(arguments["cfg_scale"])
    sample = sample_tokens(
        record.model.diffloss.net,
        Diffusion(respaced_timesteps(steps)),
        expected["head.z"],
        noise,
        guidance=scale if scale != 1.0 else None,
        temperature=float(arguments["temperature"]),
    )
    assert relative_error(sample, expected["head.sample"]) < 1e-3


def test_whole_generation(record: Record) -> None:
    arguments = record.arguments
    latents = generate(
        record.model,
        record.tensors.get("generate.labels", record.tensors["train.labels"]),
        RecordedNoise(record),
        ar_steps=int(arguments["num_iter"]),
        diffusion_steps=int(arguments["num_sampling_steps"]),
        guidance=float(arguments["cfg_scale"]),
        guidance_schedule=arguments["cfg_schedule"],
        temperature=float(arguments["temperature"]),
    )
    assert relative_error(latents, record.tensors["generate.latents"]) < 1e-3
