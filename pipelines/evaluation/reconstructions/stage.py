"""Evaluation of a tokenizer: images → reconstructions → features, and metrics of both."""

import json
from typing import Any

import numpy as np
import torch

from mar_model.tokenizers import load_tokenizer
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.image_sets.sets import RealImages, ReconstructedImages, ranges, read_sources
from pipelines.evaluation.metrics import uncertainty
from pipelines.evaluation.metrics.definitions import described, names_of
from pipelines.evaluation.reconstructions.actor import Reconstructing, Reconstructor, pairs_there, read_pairs
from pipelines.evaluation.reconstructions.pixel_metrics import DEFINITIONS, NAMES, NO_WEIGHTS, WINDOW, lpips_network
from pipelines.evaluation.record import check_count, features_path, write_record
from pipelines.evaluation.reference_file import Reference
from pipelines.evaluation.references.building import chosen_images
from pipelines.evaluation.references.made import source_statistics, statistics_path
from pipelines.evaluation.scoring.actor import Judges, scored
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, is_whole, shards_there
from pipelines.evaluation.scoring.measure import Measured, measure
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.pairs import pairs_picture
from pipelines.images.pixels import to_model, to_uint8
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import check_tokenizer_files, tokenizer_config, tokenizer_digest

PICTURE, PIXELS = "pairs.png", "pairs"
PAIRS = 8  # in the picture
LPIPS = "evaluate.lpips_weights"


def evaluate_tokenizer(images: Images, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Compare the reconstructions of `evaluate.tokenizer` with their originals: up to `evaluate.images` images of `evaluate.split`, chosen
    by the hash of their keys.

    Metrics: the Fréchet distance of the two sets (`rfid` with Inception), `psnr`, `ssim` and, with `evaluate.lpips_weights`, `lpips`, each
    with its standard error. `evaluate.path` gets the record and its files, as every evaluation's. Returns the summary. Raises UserError for
    a tokenizer, weights or images that can't be used.
    """
    check_count("evaluate.images", evaluate.images)
    digest = network_digest(evaluate.features, evaluate.weights)
    if evaluate.lpips_weights:
        lpips_network(evaluate.lpips_weights)
    size, stride = images.settings.size, _stride(evaluate.tokenizer)
    if size % stride:
        raise UserError(f"images.size is {size}, expected a multiple of {stride}, the stride of {evaluate.tokenizer!r}")
    require_workers({"evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
    rows = chosen_images(images, evaluate.split, evaluate.images, at_most=True)
    real = RealImages(images.settings, rows)
    reconstructed = ReconstructedImages(images.settings, rows, evaluate.tokenizer)
    identity = {
        "evaluate.features": identity_of(evaluate=evaluate)["evaluate.features"],
        "evaluate.split": evaluate.split,
        "network": digest,
        "tokenizer": tokenizer_digest(evaluate.tokenizer),
        "images": storage.digest(json.dumps([real.identity(), real.versions()], sort_keys=True).encode()),
    }
    finished = stage.begin(evaluate.path, identity, enough=lambda summary: "lpips" in summary or not evaluate.lpips_weights)
    if finished is not None:
        return finished
    stage.say(f"features of {len(real):,} images and of their reconstructions")
    [statistics] = source_statistics([real], evaluate, digest, stage)
    kept, pairs = _reconstruct(real, evaluate, digest, stage)
    found = _measured(kept, pairs, Reference.load(statistics_path(evaluate, real, digest), evaluate.features), evaluate)
    storage.write_bytes(storage.join(evaluate.path, PICTURE), _picture(real, reconstructed))
    stage.artifact(storage.join(evaluate.path, PICTURE))
    record = {
        "reference": {**real.identity(), "images": statistics.count, "split": evaluate.split, "source": images.settings.source},
        "network": {"name": evaluate.features, "digest": digest},
        "tokenizer": {"path": evaluate.tokenizer, "digest": identity["tokenizer"], **tokenizer_config(evaluate.tokenizer)},
        "seed": stage.seed,
        "identity": identity,
    }
    return write_record(found, {}, record, np.full(len(pairs["index"]), -1), evaluate, stage)


def reconstruction_name(features: str) -> str:
    """What the Fréchet distance of reconstructions is called, by the feature network."""
    return "rfid" if features == "inception" else f"reconstruction_{names_of('fid', features)[0]}"


def _stride(path: str) -> int:
    tokenizer_config(path) if storage.exists(storage.join(path, "config.json")) else tokenizer_digest(path)
    check_tokenizer_files(path)
    return load_tokenizer(storage.local_directory(path)).stride


def _reconstruct(real: RealImages, evaluate: EvaluateSettings, digest: str, stage: Stage) -> tuple[KeptFeatures, dict[str, np.ndarray]]:
    """The features of all reconstructions, and the metrics of the pairs; what an earlier attempt kept is not computed again."""
    import ray.data

    path = features_path(evaluate.path, evaluate.features, digest)
    pairs_path = storage.join(evaluate.path, PIXELS + ("-lpips" if evaluate.lpips_weights else ""))
    wanted = ranges(len(real), evaluate.batch)
    done = {one for one in pairs_there(pairs_path).intersection(shards_there(path)) if is_whole(path, one, False)}
    judges = Judges(evaluate.features, evaluate.weights, "", evaluate.actors, stage.cluster, [path])
    job = Reconstructing(evaluate.tokenizer, evaluate.lpips_weights, stage.cluster, pairs_path)
    seen = sum(stop - start for start, stop in done.intersection(wanted))
    with stage.progress(len(real), done=seen) as bar:
        if done.issuperset(wanted):
            bar.update(seen)
        else:
            dataset = read_sources([real], evaluate.batch, [done]).map_batches(
                Reconstructor,
                fn_constructor_args=(job,),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=evaluate.actors),
                num_cpus=0,
                num_gpus=stage.cluster.gpus_per_worker,
            )
            for block in scored(dataset, judges):
                seen += len(block["index"])
                bar.update(seen)
    there = [one for one in wanted if one in pairs_there(pairs_path)]
    return KeptFeatures(path, tuple(there)), read_pairs(pairs_path, there)


def _measured(kept: KeptFeatures, pairs: dict[str, np.ndarray], reference: Reference, evaluate: EvaluateSettings) -> Measured:
    found = measure(kept, evaluate.features, reference, ["fid"])
    [fid], name = names_of("fid", evaluate.features), reconstruction_name(evaluate.features)
    for values in (found.values, found.errors, found.extrapolated):
        if fid in values:
            values[name] = values.pop(fid)
    found.definitions = {name: f"of reconstructions against the same originals: {described('fid', evaluate.features)}"}
    reasons = {"lpips": NO_WEIGHTS, "ssim": f"the images are smaller than the window of {WINDOW}×{WINDOW} pixels"}
    for metric in NAMES:
        each = pairs[metric]
        if np.isnan(each).any():
            found.left_out[metric] = reasons[metric]
            continue
        found.values[metric], found.definitions[metric] = float(each.mean()), DEFINITIONS[metric]
        few = len(each) < uncertainty.BLOCKS
        found.errors[metric] = float("nan") if few else float(each.std(ddof=1) / np.sqrt(len(each)))
    return found


@torch.inference_mode()
def _picture(real: RealImages, reconstructed: ReconstructedImages) -> bytes:
    """The first originals that can be read, above their reconstructions."""
    shown = min(PAIRS, len(real))
    originals = real.block(0, shown).images
    tokenizer = load_tokenizer(storage.local_directory(reconstructed.tokenizer))
    decoded = to_uint8(tokenizer.decode(tokenizer.moments(to_model(originals)).chunk(2, dim=1)[0]))
    return pairs_picture(np.stack([originals, decoded], axis=1))
