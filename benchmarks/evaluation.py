"""Evaluation at scale against torch-fidelity: agreement, speed and memory, each with its bar.

    python -m benchmarks.evaluation [whole_path spatial speed actors kept memory]

whole_path: 600 photographs in a folder, Inception with random weights, evaluated through Ray and by torch-fidelity's `calculate_metrics`.
spatial: spatial features against a hook on torch-fidelity's network. speed: one scoring actor against torch-fidelity's extractor alone,
by turns. actors: two actors against one, beside two processes without Ray. kept: all metrics of 50,000 × 2,048 synthetic features
against 10,000, and the peak memory. memory: peak memory of all processes for 2,000 and 20,000 samples in an .npz.
Without arguments: whole_path, spatial, speed.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peak_memory import PeakMemory
from benchmarks.photographs import row as print_row
from benchmarks.photographs import write_photographs
from pipelines.evaluation.features.inception import DIGEST_GIVEN, Inception
from pipelines.evaluation.features.sizes import Features
from pipelines.evaluation.given_samples import evaluate_given
from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.scoring.actor import Judges, ScoringActor
from pipelines.evaluation.scoring.feature_shards import FeatureShard, KeptFeatures, write_shard
from pipelines.evaluation.scoring.measure import measure
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.settings import ImageSettings
from pipelines.runtime import storage
from pipelines.runtime.cluster.connection import connected
from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage

SIDE, COUNT, BATCH = 64, 600, 32
ROWS: list[tuple[str, str, str, str, str]] = []  # printed once Ray, which takes over the terminal, has ended
SECTIONS = ("whole_path", "spatial", "speed", "actors", "kept", "memory")


def row(what: str, found: str, baseline: str, ratio: str, bar: str) -> None:
    """One line of the result."""
    ROWS.append((what, found, baseline, ratio, bar))


def random_inception(folder: Path) -> tuple[Any, str]:
    """torch-fidelity's network with random weights, and the file of these weights in the published layout."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    path = folder / "inception.pth"
    torch.manual_seed(0)
    load, state = theirs.load_state_dict_from_url, theirs.FeatureExtractorInceptionV3.load_state_dict
    theirs.load_state_dict_from_url = lambda *_, **__: {}  # the only way to build it without downloading
    theirs.FeatureExtractorInceptionV3.load_state_dict = lambda *_, **__: None
    try:
        network = theirs.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    finally:
        theirs.load_state_dict_from_url, theirs.FeatureExtractorInceptionV3.load_state_dict = load, state
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.05)  # random convolutions shrink what goes through them
    torch.save(network.state_dict(), path)
    return network.eval(), f"{path}{DIGEST_GIVEN}{storage.digest(path.read_bytes())}"


def photographs(folder: Path, target: Path, seed: int) -> str:
    """COUNT different images in the folder `target`, cut from made photographs."""
    source = Path(write_photographs(folder / f"whole-{seed}", 100))
    files = sorted(source.rglob("*.jpg"))
    generator = np.random.default_rng(seed)
    target.mkdir(parents=True)
    for number in range(COUNT):
        with Image.open(files[number % len(files)]) as image:
            left, top = generator.integers(0, image.width - SIDE), generator.integers(0, image.height - SIDE)
            image.crop((left, top, left + SIDE, top + SIDE)).save(target / f"{number:04d}.png")
    return str(target)


def whole_path(folder: Path, cluster: ClusterSettings) -> bool:
    """`evaluate_given`, which `mar evaluate --samples` runs, against torch-fidelity's metrics of the same files."""
    import torch_fidelity

    _, weights = random_inception(folder)
    generated = photographs(folder, folder / "generated", 1)
    reference = photographs(folder, folder / "reference" / "all", 2)
    settings = EvaluateSettings(
        path=str(folder / "evaluation"), samples=generated, reference=str(folder / "reference"), weights=weights, batch=BATCH
    )
    began = time.monotonic()
    found = evaluate_given(Images(ImageSettings(size=SIDE)), "", settings, Stage("evaluate", cluster))
    ours = time.monotonic() - began
    began = time.monotonic()
    theirs = torch_fidelity.calculate_metrics(
        input1=generated, input2=reference, cuda=False, isc=True, fid=True, kid=True, prc=True, verbose=False, batch_size=BATCH,
        kid_subset_size=COUNT, feature_layer_prc="2048", cache=False, save_cpu_ram=True, samples_find_ext="png",
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights.partition(DIGEST_GIVEN)[0],
        feature_layer_isc="logits_unbiased", feature_layer_fid="2048", feature_layer_kid="2048",
    )  # fmt: skip
    seconds = time.monotonic() - began
    pairs = {
        "fid": "frechet_inception_distance", "inception_score_mean": "inception_score_mean",
        "inception_score_std": "inception_score_std", "kid_mean": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
    }  # fmt: skip
    passed = True
    for name, other in pairs.items():
        absolute = name.startswith("kid")
        error = abs(found[name] - theirs[other]) / (1.0 if absolute else max(abs(theirs[other]), 1e-12))
        bar = 1e-6 if absolute else 1e-4
        passed &= error <= bar
        row(f"whole path: {name}", f"{found[name]:.8g}", f"{theirs[other]:.8g}", f"{error:.1e}", f"{bar:g}")
    row("whole path: seconds, with Ray's start-up", f"{ours:.0f} s", f"{seconds:.0f} s", "", "none")
    return passed


def spatial(folder: Path, cluster: ClusterSettings) -> bool:
    """Spatial features against a hook on torch-fidelity's network, and sFID against the formula in numpy."""
    network, weights = random_inception(folder)
    hooked: list[torch.Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: hooked.append(output))
    images = np.random.default_rng(0).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    with torch.inference_mode():
        network(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = hooked[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(images), -1)
    found = Inception(weights, torch.device("cpu")).features(images).spatial
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    row("spatial features against a hook", "2,023 values", "torch-fidelity", f"{error:.1e}", "1e-06")
    halves = [one.astype(np.float64) for one in np.split(expected, 2)]
    mu = [one.mean(0) for one in halves]
    sigma = [np.cov(one, rowvar=False) for one in halves]
    cross = np.sqrt(np.linalg.eigvals(sigma[0] @ sigma[1]).real.clip(0)).sum()
    formula = float(np.square(mu[0] - mu[1]).sum() + np.trace(sigma[0]) + np.trace(sigma[1]) - 2 * cross)
    ours = frechet_distance(*(part for one in np.split(found, 2) for part in FeatureSums.of(one).moments()))
    relative = abs(ours - formula) / formula
    row("sFID against the formula in numpy", f"{ours:.8g}", f"{formula:.8g}", f"{relative:.1e}", "1e-06")
    return error <= 1e-6 and relative <= 1e-6


def speed(folder: Path, cluster: ClusterSettings) -> bool:
    """Images a second of a scoring actor, which also keeps the features, against torch-fidelity's extractor, by turns."""
    import ray

    network, weights = random_inception(folder)
    images = np.random.default_rng(0).integers(0, 256, (4 * BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    actor = ray.remote(ScoringActor).options(num_cpus=1).remote(Judges("inception", weights, "", 1, cluster, [str(folder / "speed")]))
    torch.set_num_threads(cluster.threads)

    def ours(turn: int) -> float:
        blocks = []
        for number in range(len(images) // BATCH):
            start = turn * len(images) + number * BATCH
            place = {"source": 0, "start": start, "stop": start + BATCH, "label": -1}
            columns = {name: np.full(BATCH, value) for name, value in place.items()}
            blocks.append({**columns, "index": np.arange(start, start + BATCH), "image": images[number * BATCH : (number + 1) * BATCH]})
        references = [ray.put(block) for block in blocks]
        began = time.monotonic()
        ray.get([actor.__call__.remote(reference) for reference in references])
        return len(images) / (time.monotonic() - began)

    def theirs(turn: int) -> float:
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH)
        began = time.monotonic()
        with torch.inference_mode():
            for batch in batches:
                network(batch)
        return len(images) / (time.monotonic() - began)

    measured = [(ours(turn), theirs(turn)) for turn in range(4)][1:]
    mean = [float(np.median([pair[side] for pair in measured])) for side in (0, 1)]
    row("one actor against the extractor alone", f"{mean[0]:.1f} images/s", f"{mean[1]:.1f} images/s", f"{mean[0] / mean[1]:.2f}", "0.95")
    return mean[0] / mean[1] >= 0.95


def actors(folder: Path, cluster: ClusterSettings) -> bool:
    """Two scoring actors against one, and two processes with torch-fidelity's network against one."""
    import ray

    _, weights = random_inception(folder)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    two = [
        ray.remote(ScoringActor).options(num_cpus=1).remote(Judges("inception", weights, "", 1, cluster, [str(folder / f"actor-{one}")]))
        for one in range(2)
    ]
    block = ray.put(images)

    def rate(used: list[Any], turn: int) -> float:
        def one(start: int) -> dict[str, Any]:
            place = {"source": 0, "start": start, "stop": start + BATCH, "label": -1}
            return {**{name: np.full(BATCH, value) for name, value in place.items()}, "index": np.arange(BATCH), "image": ray.get(block)}

        blocks = 4 * len(used)
        began = time.monotonic()
        ray.get([used[number % len(used)].__call__.remote(one((turn * 100 + number) * BATCH)) for number in range(blocks)])
        return blocks * BATCH / (time.monotonic() - began)

    rate(two, 0)
    ratios = [rate(two, 2 * turn) / rate(two[:1], 2 * turn + 1) for turn in (1, 2, 3)]
    ceiling = _ceiling()
    ratio = float(np.median(ratios))
    row("two actors against one", f"{ratio:.2f}", f"ceiling {ceiling:.2f}", "", "1.7")
    return ratio >= 1.7


def _ceiling() -> float:
    """How much more matrix products two processes of one thread do than one: the machine's own limit."""
    code = (
        "import time, torch; torch.set_num_threads(1); a = torch.randn(512, 512); end = time.monotonic() + 4; n = 0\n"
        "while time.monotonic() < end: a @ a; n += 1\nprint(n)"
    )

    def products(count: int) -> int:
        running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return sum(int(one.communicate()[0]) for one in running)

    alone = products(1)
    return products(2) / alone


def kept(folder: Path, cluster: ClusterSettings) -> bool:
    """Seconds of each metric of 50,000 kept features against 10,000, and the peak memory of all processes."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(0, 1, (64, 2048)).astype(np.float32)

    def pooled(count: int) -> np.ndarray:
        values = generator.normal(0, 1, (count, 64)).astype(np.float32) @ mixing
        return np.abs(values) / 8 + generator.random((count, 2048), np.float32) / 4

    size, ranges = 500, [(start, start + 500) for start in range(0, 50_000, 500)]
    for start, stop in ranges:
        logits = generator.normal(0, 3, (size, 1008)).astype(np.float32)
        features = Features(pooled(size), generator.random((size, 2023), np.float32), logits)
        index = np.arange(start, stop)
        write_shard(str(folder / "features"), FeatureShard(start, stop, index, index % 1000, np.full(size, -1), features))
    reference = pooled(10_000)
    spatial_sums = FeatureSums.of(generator.random((5_000, 2023), np.float32))
    known = Reference(FeatureSums.of(reference).moments(), spatial_sums.moments(), reference)
    features_kept = KeptFeatures(str(folder / "features"), tuple(ranges))
    with PeakMemory() as peak:
        for metrics in (["fid"], ["sfid"], ["inception_score"], ["kid"], ["precision", "recall"]):
            began = time.monotonic()
            found = measure(features_kept, "inception", known, metrics)
            values = ", ".join(f"{name} {value:.4g} ± {found.errors.get(name, float('nan')):.2g}" for name, value in found.values.items())
            row(f"50,000 features: {' '.join(metrics)}", f"{time.monotonic() - began:.0f} s", values, "", "none")
    row("50,000 features: peak memory", f"{peak.gigabytes:.2f} GB", "", "", "6 GB")
    return peak.gigabytes <= 6


def memory(folder: Path, cluster: ClusterSettings) -> bool:
    """Peak memory of all processes while 2,000 and 20,000 samples of an .npz are evaluated, without what the machine had before."""
    found = {}
    generator = np.random.default_rng(0)
    np.savez(folder / "reference.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    for count in (2_000, 20_000):
        np.savez(folder / f"{count}.npz", generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        settings = EvaluateSettings(
            path=str(folder / f"evaluation-{count}"), samples=str(folder / f"{count}.npz"), reference=str(folder / "reference.npz"),
            features="efficientnet-lite0", metrics=["fid"],
        )  # fmt: skip
        with PeakMemory() as peak:
            evaluate_given(Images(ImageSettings(size=32)), "", settings, Stage("evaluate", cluster))
        found[count] = peak.gigabytes
    growth = found[20_000] / found[2_000] - 1
    row("peak memory, 2,000 → 20,000 samples", f"{found[20_000]:.2f} GB", f"{found[2_000]:.2f} GB", f"{growth:+.0%}", "+10%")
    return growth < 0.1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    wanted = parser.parse_args().sections or ["whole_path", "spatial", "speed"]
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)}")
    functions: dict[str, Callable[[Path, ClusterSettings], bool]] = {
        "whole_path": whole_path, "spatial": spatial, "speed": speed, "actors": actors, "kept": kept, "memory": memory,
    }  # fmt: skip
    cluster = ClusterSettings(cpus=2)
    failed = []
    root = Path(tempfile.mkdtemp(prefix="benchmark-evaluation-"))
    try:
        with connected(cluster, root / "ray.log"):
            for name in wanted:
                folder = root / name
                folder.mkdir()
                if not functions[name](folder, cluster):
                    failed.append(name)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for columns in ROWS:
        print_row(*columns)
    print(f"largest resident set of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    print(f"below the bar: {', '.join(failed)}" if failed else "every bar is met")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
