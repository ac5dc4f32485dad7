"""Inception-v3 of 2015, as torch-fidelity ports it: the network of every published FID."""

import hashlib
import io

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.features.sizes import CPU_CHUNK, DIMENSIONS, SPATIAL_CHANNELS, Features
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_DIGEST = "6726825d"  # the first digits of the file's SHA-256
DIGEST_GIVEN = "#sha256="  # after a path: the first digits of another file's SHA-256, which is taken in place of the published one


class Inception:
    """torch-fidelity's port of the 2015 Inception-v3: the features that every published FID is computed with.

    pooled: the 2,048 values after average pooling. spatial: ADM's `mixed_6/conv:0[..., :7]`, the first 7 channels of the 1×1 branch of the
    block that torch ports call Mixed_6d, after its ReLU, 17×17×7. logits: 1,008, without the bias of the last layer.
    The network scales images to 299×299 itself, as the original TensorFlow graph does.
    """

    name = "inception"
    dimension = DIMENSIONS[name]

    def __init__(self, weights: str, device: torch.device, expected_digest: str = INCEPTION_DIGEST) -> None:
        """`expected_digest`: what the SHA-256 of the file `weights` begins with."""
        data = inception_weights(weights, expected_digest)
        self.digest = storage.digest(data)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # its constructor unpickles without restriction, so it gets a copy that a restricted load has been through
        trusted = io.BytesIO()
        torch.save(torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"), trusted)
        trusted.seek(0)
        layers = [str(self.dimension), "logits_unbiased"]
        self._network = FeatureExtractorInceptionV3(self.name, layers, feature_extractor_weights_path=trusted).to(device)
        self._device = device
        self._spatial: Tensor | None = None
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.features(images).pooled

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> Features:
        chunk = CPU_CHUNK if self._device.type == "cpu" else len(images)
        parts = [self._part(part) for part in torch.from_numpy(images.copy()).split(chunk)]
        return Features(*(torch.cat(one).cpu().numpy() for one in zip(*parts, strict=True)))

    def _part(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled, logits = self._network(images.to(self._device).permute(0, 3, 1, 2))
        assert self._spatial is not None
        return pooled, self._spatial, logits

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def inception_weights(weights: str, expected_digest: str) -> bytes:
    """The bytes of the weights file. Raises UserError where there is none, and for one of another digest.

    `PATH#sha256=DIGEST` names weights of the same layout that are not the published ones.
    """
    weights, _, given = weights.partition(DIGEST_GIVEN)
    expected_digest = given or expected_digest
    get = f"download {INCEPTION_URL} (91 MB; its SHA-256 begins with {INCEPTION_DIGEST}) and name the file in evaluate.weights"
    if not weights or not storage.exists(weights):
        found = "is not set" if not weights else f"{weights!r} is not there"
        raise UserError(f"the feature network inception needs its weights file, and evaluate.weights {found}: {get}")
    data = storage.read_bytes(weights)
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(expected_digest):
        raise UserError(f"evaluate.weights {weights!r} has the SHA-256 {digest[:16]}…, expected {expected_digest}…: {get}")
    return data
