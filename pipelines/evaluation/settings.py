"""Section `evaluate` of the configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.runtime.settings import Count, identity, operational

TrainingImages = Annotated[int, Field(ge=0, le=10_000, description="0 to 10,000")]  # a reference file keeps the features of no more


@dataclass
class EvaluateSettings:
    """Section `evaluate`. How images are drawn is section `generate`; here: how many, and against what."""

    path: str = operational("runs/mar/evaluation", "directory of the evaluation record")
    images: Count = identity(50_000, "samples drawn, equal per class")
    samples: str = operational(
        "", "samples to evaluate in place of drawn ones: folder of images, .npz with arr_0, WebDataset, Parquet, or a folder with shards/"
    )
    tokenizer: str = operational("", "tokenizer to evaluate by its reconstructions of images, in place of samples")
    split: Literal["held_out", "train", "all"] = operational("held_out", "part of images.source that evaluate.tokenizer reconstructs")
    lpips_weights: str = operational("", "file of VGG16's weights (torchvision's vgg16-397923af.pth), for LPIPS of evaluate.tokenizer")
    reference: str = identity("", "statistics .npz, latent cache, or image source; empty: the held-out part of images.source")
    features: Literal["inception", "efficientnet-lite0", "dinov2"] = identity(
        "inception", "feature network: inception (result named fid), dinov2 (fd_dinov2) or efficientnet-lite0"
    )
    weights: str = operational("", "weights file of Inception or DINOv2 (the embedded network needs none)")
    metrics: list[Literal["fid", "sfid", "inception_score", "kid", "precision", "recall"]] = operational(
        help="metrics to compute; empty: all that the feature network and the reference allow", factory=list
    )
    classifier: str = identity("", "directory of a trained classifier, for label agreement; empty: none")
    training_images: TrainingImages = operational(
        10_000, "training images among which the nearest one to each sample is searched (images.source); 0: none"
    )
    checkpoints: Literal["newest", "all"] = operational(
        "newest", "newest: one checkpoint; all: every kept checkpoint of train.path, each in a directory of its own in evaluate.path"
    )
    batch: Count = operational(64, "images a batch of the feature network")
    actors: Count = operational(1, "actors that hold the feature network")
