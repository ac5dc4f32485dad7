"""Perceptual distances: LPIPS with VGG16 (arXiv 1801.03924), whose weights are read from local files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mar_model.files import describe_misfit, read_tensors, shapes_of

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)  # the convolutions' widths
TAPS = (3, 8, 15, 22, 29)  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: torchvision's numbers in `features`
WIDTHS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS, for images in [-1, 1]
EPSILON = 1e-10


class LPIPS(nn.Module):
    """The distance of two images: squared differences of VGG16's features, each position's features scaled to length 1, weighted by
    channel, averaged over positions and summed over five layers. It has no gradients to its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        wide = 3
        for width in VGG16:
            if width == "pool":
                self.features.append(nn.MaxPool2d(2))
            else:
                self.features.append(nn.Conv2d(wide, int(width), 3, padding=1)).append(nn.ReLU())
                wide = int(width)
        self.channel_weights = nn.ParameterList([nn.Parameter(torch.full((width,), 1 / width)) for width in WIDTHS])
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] → distances (B,)."""
        distance = torch.zeros((), device=images.device)
        for one, other, weights in zip(self.layers(images), self.layers(others), self.channel_weights, strict=True):
            difference = (_unit_length(one) - _unit_length(other)).square()
            distance = distance + torch.einsum("bchw,c->bhw", difference, weights).mean(dim=(1, 2))
        return distance

    def layers(self, images: Tensor) -> list[Tensor]:
        """The features of the five layers, (B, C, h, w) each."""
        x, taken = (images - self.shift) / self.scale, []
        for number, module in enumerate(self.features):
            x = module(x)
            if number in TAPS:
                taken.append(x)
        return taken


def _unit_length(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)


def load_lpips(vgg16: Path, linear: Path) -> LPIPS:
    """LPIPS from torchvision's `vgg16-397923af.pth` and the package lpips' `vgg.pth` (or safetensors files with the same names).

    Raises ValueError where a file is damaged, needs code to be run, or does not have these tensors.
    """
    network = LPIPS()
    features = {name: value for name, value in _weights(vgg16).items() if name.startswith("features.")}
    expected = shapes_of({name: value for name, value in network.state_dict().items() if name.startswith("features.")})
    layers = {f"lin{number}.model.1.weight": (1, width, 1, 1) for number, width in enumerate(WIDTHS)}
    found = _weights(linear)
    for path, misfit in ((vgg16, describe_misfit(expected, shapes_of(features))), (linear, describe_misfit(layers, shapes_of(found)))):
        if misfit:
            raise ValueError(f"{path} does not hold the weights that LPIPS needs: {misfit}")
    weights = {f"channel_weights.{number}": found[name].flatten() for number, name in enumerate(layers)}
    network.load_state_dict({name: value.float() for name, value in {**features, **weights}.items()})
    return network


def _weights(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a pickle can hold that it should not
        raise ValueError(f"{path} is damaged or needs code to be run: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}, expected named tensors")
    return content


def feature_distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """The same distance for any network's features, all channels weighted alike: lists of (B, C, h, w) → (B,)."""
    distances = [
        (_unit_length(one) - _unit_length(other)).square().mean(dim=(1, 2, 3)) for one, other in zip(features, others, strict=True)
    ]
    return torch.stack(distances).sum(dim=0)
