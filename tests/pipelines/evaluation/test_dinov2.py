"""DINOv2 as a feature network: the published file's layout, its positions, and its metrics' names."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from pipelines.evaluation.features.dinov2 import MODEL, DINOv2, positions
from pipelines.evaluation.metrics.definitions import described, names_of, wanted_metrics
from pipelines.runtime.errors import DamagedFileError, UserError

CPU = torch.device("cpu")
SMALL = "vit_small_patch14_dinov2"


def published_file(path: Path) -> tuple[Path, torch.nn.Module]:
    """A file of the published layout with random weights of the small model, and timm's model with them."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL, pretrained=False, num_classes=0, img_size=518)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 384)}, path)
    return path, network.eval()


def test_features_are_timms_of_an_image_at_the_published_positions(tmp_path: Path) -> None:
    path, network = published_file(tmp_path / "dinov2.pth")
    images = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    found = DINOv2(str(path), CPU, model=SMALL).features(images)
    assert [one.shape for one in found] == [(9, 384), (9, 0), (9, 0)]
    smaller = timm.create_model(SMALL, pretrained=False, num_classes=0, img_size=224)
    weights = network.state_dict()
    weights["pos_embed"] = positions(weights["pos_embed"], 16)
    smaller.load_state_dict(weights)
    pixels = F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, (224, 224), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = smaller.eval()((pixels - mean) / std)
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_sampled_at_the_published_scale() -> None:
    row = torch.arange(37.0)
    grid = torch.stack([row.view(37, 1).expand(37, 37), row.view(1, 37).expand(37, 37)], dim=-1).view(1, 37 * 37, 2)
    published = torch.cat([torch.full((1, 1, 2), 7.0), grid], dim=1)
    found = positions(published, 16)
    assert torch.equal(found[:, 0], published[:, 0])
    inner = found[0, 1:].view(16, 16, 2)[2:-2, 2:-2]  # where the edges play no part
    expected = (torch.arange(16.0) + 0.5) * 37 / 16.1 - 0.5  # PyTorch's cubic (−0.75) keeps a ramp to 0.05; of 37 / 16 it is off by 0.19
    torch.testing.assert_close(inner[:, 0, 0], expected[2:-2], atol=0.06, rtol=0)
    torch.testing.assert_close(inner[0, :, 1], expected[2:-2], atol=0.06, rtol=0)
    assert positions(published, 37) is published


def test_the_large_model_has_the_published_layout() -> None:
    with torch.device("meta"):
        network = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=518)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert sum(value.numel() for value in network.parameters()) == 304_368_640 - 1024  # published, with the mask token
    assert shapes["pos_embed"] == (1, 1370, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert shapes["blocks.23.ls2.gamma"] == (1024,)
    assert shapes["blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["norm.bias"] == (1024,)


def test_files_that_are_not_it_are_refused(tmp_path: Path) -> None:
    path, network = published_file(tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match=r"needs its weights file, and evaluate\.weights is not set: download"):
        DINOv2("", CPU)
    with pytest.raises(UserError, match=r"has the SHA-256 [0-9a-f]{16}…, expected 1234…"):
        DINOv2(f"{path}#sha256=1234", CPU, model=SMALL)
    without = {name: value for name, value in network.state_dict().items() if name != "blocks.3.ls1.gamma"}
    torch.save(without, tmp_path / "without.pth")
    with pytest.raises(UserError, match=r"does not hold the weights of DINOv2 ViT-L/14: .*blocks\.3\.ls1\.gamma"):
        DINOv2(str(tmp_path / "without.pth"), CPU, model=SMALL)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DamagedFileError, match=r"dinov2\.pth"):
        DINOv2(str(path), CPU, model=SMALL)


def test_its_numbers_have_names_of_their_own() -> None:
    assert wanted_metrics([], "dinov2") == ["fid", "kid", "precision", "recall"]
    assert names_of("fid", "dinov2") == ("fd_dinov2",)
    assert names_of("precision", "dinov2") == ("precision_dinov2",)
    assert "not comparable" not in described("fid", "dinov2")
    assert "not comparable" in described("precision", "dinov2")
    with pytest.raises(UserError, match=r"evaluate\.metrics names sfid, which the feature network dinov2 does not allow"):
        wanted_metrics(["fid", "sfid"], "dinov2")
