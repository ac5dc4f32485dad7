"""Speed and quality of each fast mode of generation on the demo's model: seconds per image, label agreement, Fréchet distance.

    python -m benchmarks.fast_modes [RUN, a finished `mar quickstart`: runs/demo] [--images 500] [--precision float32]

Every mode draws the same samples with the settings of the run's evaluation, in batches of 100, in alternation, on one thread. Seconds are
medians over batches. The distance (EfficientNet-Lite0) is to the held-out images.
"""

import argparse
import json
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.evaluation.classifier.network import load_classifier
from pipelines.evaluation.features import load_network
from pipelines.evaluation.image_sets.sets import RealImages
from pipelines.evaluation.statistics import FeatureStatistics, FeatureSums, distance
from pipelines.generation.planning import plan_drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.generation.worker import LoadedModel
from pipelines.images.listing import list_images
from pipelines.images.settings import ImageSettings
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage

BATCH = 100
ANNEALED = {"diffusion_steps_end": 5}
REUSED = {"reuse_steps": 3}
INTERVAL = {"guidance_interval": [0.1, 0.7]}
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact, 15 diffusion steps": {"diffusion_steps": 15},
    "diffusion steps annealed to 5": ANNEALED,
    "features reused for 3 steps": REUSED,
    "guidance in 0.1 to 0.7 of the noise": INTERVAL,
    "all three": {**ANNEALED, **REUSED, **INTERVAL},
    "ddim": {"sampler": "ddim"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    options = parser.parse_args()
    run: Path = options.run
    known = {one.name for one in fields(GenerateSettings)} - {"path", "checkpoint"}
    record = json.loads((run / "evaluation" / "evaluation.json").read_text())
    settings = GenerateSettings(**{name: value for name, value in record["generation"].items() if name in known})
    settings = replace(settings, precision=options.precision)
    stage = Stage("generate", ClusterSettings(), seed=record["seed"])
    drawing = plan_drawing(str(run), str(run / "tokenizer"), str(run / "train"), settings, stage)
    models = {mode: LoadedModel(replace(drawing, settings=replace(settings, **changes))) for mode, changes in MODES.items()}

    labels = drawing.labels_of(range(options.images))
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    drawn: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    for model in models.values():
        model.images(labels[:2], range(2))  # warm-up
    for start in range(0, options.images, BATCH):
        numbers = range(start, min(start + BATCH, options.images))
        for mode, model in models.items():
            began = time.perf_counter()
            drawn[mode].append(model.images(labels[start : start + BATCH], numbers)[0])
            seconds[mode].append((time.perf_counter() - began) / len(numbers))
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}

    network = load_network("efficientnet-lite0", "", torch.device("cpu"))
    classifier = load_classifier(str(run / "classifier"))

    def features(images: np.ndarray) -> FeatureStatistics:
        return FeatureStatistics.of(FeatureSums.of(network(images)), network.name, network.digest)

    source = ImageSettings(source=str(run / "digits"), size=drawing.state["image_size"], held_out_folder="held_out")
    rows = list_images(source).held_out()
    held_out = features(RealImages(source, rows).read(0, len(rows)))
    table = [f"{'mode':<40} {'ms/image':>9} {'speed':>7} {'label agreement':>16} {'Fréchet distance':>17}"]
    for mode, parts in drawn.items():
        images = np.concatenate(parts)
        figures = {
            "seconds_per_image": medians[mode],
            "speed": medians["exact"] / medians[mode],
            "label_agreement": float(np.mean(classifier.predict(images) == labels)),
            "frechet_distance": distance(features(images), held_out),
        }
        print(
            json.dumps({"benchmark": "fast_modes", "mode": mode, "images": options.images, "settings": MODES[mode], **figures}), flush=True
        )
        shown = f"{1000 * medians[mode]:>9.2f} {figures['speed']:>6.2f}× {figures['label_agreement']:>16.3f}"
        table.append(f"{mode:<40} {shown} {figures['frechet_distance']:>17.1f}")
    print("\n".join(table))


if __name__ == "__main__":
    main()
