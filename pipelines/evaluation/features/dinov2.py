"""DINOv2 ViT-L/14: the network of the Fréchet distances that are published as FD-DINOv2."""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar_model.files import describe_misfit, shapes_of
from pipelines.evaluation.features.sizes import CPU_CHUNK, DIMENSIONS, Features
from pipelines.evaluation.features.weights import weights_bytes
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
GET = f"download {URL} (1.2 GB) and name the file in evaluate.weights"
MODEL = "vit_large_patch14_dinov2"  # timm's name
SIDE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values in [0, 1]
OFFSET = 0.1  # added to the side of the grid of positions before its scale is taken, as the published model does
UNUSED = ("mask_token",)  # only pre-training reads it


class DINOv2:
    """DINOv2 ViT-L/14 (arXiv 2304.07193), whose architecture is timm's and whose weights are the published file's.

    pooled: the 1,024 values of the class token after the last norm. There are no spatial features and no logits. Images are scaled to
    224×224 (bicubic, antialiased) and normalised with ImageNet's mean and standard deviation, as EDM2 (arXiv 2312.02696) does.
    """

    name = "dinov2"
    dimension = DIMENSIONS[name]

    def __init__(self, weights: str, device: torch.device, *, model: str = MODEL) -> None:
        data = weights_bytes("the feature network dinov2", weights, GET)
        self.digest = storage.digest(data)
        self._network = _network(model, _tensors(weights, data), weights).to(device)
        self._device = device

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.features(images).pooled

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Features:
        chunk = CPU_CHUNK if self._device.type == "cpu" else len(images)
        pooled = torch.cat([self._network(self._pixels(part)) for part in torch.from_numpy(images.copy()).split(chunk)]).cpu().numpy()
        nothing = np.zeros((len(images), 0), np.float32)
        return Features(pooled, nothing, nothing)

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False) / 255
        mean, std = (torch.tensor(one, device=self._device).view(1, 3, 1, 1) for one in (MEAN, STD))
        return (pixels - mean) / std


def weights_digest(weights: str) -> str:
    """SHA-256 of the weights. Raises UserError if the file or the package timm is missing."""
    _timm()
    return storage.digest(weights_bytes("the feature network dinov2", weights, GET))


def positions(published: Tensor, side: int) -> Tensor:
    """The published position embedding (1, 1 + n², D), for images of `side` × `side` patches: (1, 1 + side², D)."""
    token, grid = published[:, :1], published[:, 1:]
    old = math.isqrt(grid.shape[1])
    if old == side:
        return published
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _network(model: str, tensors: dict[str, Tensor], path: str) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = _timm().create_model(model, pretrained=False, num_classes=0, img_size=SIDE)
    tensors = {name: value.float() for name, value in tensors.items() if name not in UNUSED}
    embedding = tensors.get("pos_embed")
    if embedding is not None and embedding.ndim == 3 and math.isqrt(embedding.shape[1] - 1) ** 2 == embedding.shape[1] - 1:
        tensors["pos_embed"] = positions(embedding, SIDE // PATCH)
    misfit = describe_misfit(shapes_of(network.state_dict()), shapes_of(tensors))
    if misfit:
        raise UserError(f"evaluate.weights {path!r} does not hold the weights of DINOv2 ViT-L/14: {misfit}", remedy=GET)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def _tensors(path: str, data: bytes) -> dict[str, Tensor]:
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged archive makes PyTorch raise
        raise damaged(path, str(error)[:200], GET) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise damaged(path, f"it holds {type(content).__name__}, expected named tensors", GET)
    return content


def _timm():  # type: ignore[no-untyped-def]
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"the feature network dinov2 needs the package timm ({error})", remedy="install the extra: mar-ray[dinov2]"
        ) from error
    return timm
