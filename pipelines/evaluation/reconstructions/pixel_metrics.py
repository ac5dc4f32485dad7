"""Metrics of a reconstruction beside its original: PSNR, SSIM and LPIPS, each of one pair of images."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mar_model.tokenizers.losses.perceptual import LPIPS, load_lpips
from pipelines.evaluation.features.weights import DIGEST_GIVEN, weights_bytes
from pipelines.images.pairs import psnr
from pipelines.images.pixels import to_model
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

NAMES = ("psnr", "ssim", "lpips")
WINDOW, SIGMA, K1, K2, RANGE = 11, 1.5, 0.01, 0.03, 255.0  # of Wang et al. 2004
VGG16_DIGEST = "397923af"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
GET = f"download {VGG16_URL} (528 MB) and name the file in evaluate.lpips_weights"
NO_WEIGHTS = "evaluate.lpips_weights, the file of VGG16's weights, is not set"
DEFINITIONS = {
    "psnr": "peak signal-to-noise ratio in dB, 10 log10(255² / mean squared error) of the 8-bit values, mean over images",
    "ssim": "structural similarity, mean over the channels R, G, B, positions and images: Gaussian window of 11×11 pixels, sigma 1.5, K1 "
    "0.01, K2 0.03, range 255 (Wang et al. 2004, doi 10.1109/TIP.2003.819861)",
    "lpips": "learned perceptual distance with VGG16, mean over images (arXiv 1801.03924, weights 0.1 of the package lpips)",
}


def ssim(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair of uint8 images (N, H, W, 3) → float64 (N,); NaN for images smaller than the window."""
    if min(originals.shape[1:3]) < WINDOW:
        return np.full(len(originals), np.nan)
    x, y = (torch.from_numpy(one.astype(np.float64)).permute(0, 3, 1, 2) for one in (originals, reconstructions))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    found: np.ndarray = similarity.mean(dim=(1, 2, 3)).numpy()
    return found


def _blurred(images: Tensor) -> Tensor:
    """Weighted means over the window, where it lies inside the image."""
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line = (line / line.sum()).repeat(3, 1)
    rows = F.conv2d(images, line[:, None, :, None], groups=3)
    return F.conv2d(rows, line[:, None, None, :], groups=3)


def lpips_weights_digest(weights: str) -> str:
    """SHA-256 of the file `weights`, after LPIPS was made of it. Raises as `lpips_network` does."""
    lpips_network(weights)
    return storage.digest(storage.read_bytes(weights.partition(DIGEST_GIVEN)[0]))


def lpips_network(weights: str) -> LPIPS:
    """LPIPS with VGG16's weights from the file `weights` (`evaluate.lpips_weights`) and the linear layers of the package lpips.

    Raises UserError if the file or the package is missing, and DamagedFileError.
    """
    weights_bytes("LPIPS", weights, GET, VGG16_DIGEST, setting="evaluate.lpips_weights")
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise UserError(
            "evaluate.lpips_weights is set, but the package lpips is not installed", remedy="install it: pip install 'mar-ray[lpips]'"
        )
    path = Path(weights.partition(DIGEST_GIVEN)[0])
    try:
        return load_lpips(path, Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth")
    except ValueError as error:
        raise damaged(str(path), error, GET) from error


@torch.inference_mode()
def pixel_metrics(originals: np.ndarray, reconstructions: np.ndarray, lpips: LPIPS | None) -> dict[str, np.ndarray]:
    """Each of NAMES for each pair of uint8 images (N, H, W, 3), float64 (N,); NaN if it can't be computed."""
    perceptual = np.full(len(originals), np.nan)
    if lpips is not None:
        device = lpips.shift.device
        distances = lpips(to_model(originals).to(device), to_model(reconstructions).to(device))
        perceptual = distances.double().cpu().numpy()
    return {"psnr": psnr(originals, reconstructions), "ssim": ssim(originals, reconstructions), "lpips": perceptual}
