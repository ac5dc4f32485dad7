"""Evaluation of a tokenizer: images → reconstructions → features, and metrics of both."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mar_model.tokenizers import load_tokenizer
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.image_sets.sets import RealImages, ReconstructedImages, ranges, read_sources
from pipelines.evaluation.metrics import uncertainty
from pipelines.evaluation.reconstructions.actor import Reconstructing, Reconstructor, pairs_there, read_pairs
from pipelines.evaluation.reconstructions.measure import ERRORS, measure_pairs
from pipelines.evaluation.reconstructions.pixel_metrics import lpips_weights_digest
from pipelines.evaluation.record import check_count, features_path, write_record
from pipelines.evaluation.references.building import chosen_images
from pipelines.evaluation.references.made import check_used
from pipelines.evaluation.scoring.actor import Judges, scored
from pipelines.evaluation.scoring.feature_shards import KeptFeatures, is_whole, shards_there
from pipelines.evaluation.scoring.sources import features_of, images_named
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.images.pairs import pairs_picture
from pipelines.images.pixels import to_model, to_uint8
from pipelines.images.sources.table import ImageRows
from pipelines.runtime import storage
from pipelines.runtime.cluster.workers import require_workers
from pipelines.runtime.errors import UserError
from pipelines.runtime.settings import identity_of
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import check_tokenizer_files, tokenizer_config, tokenizer_digest

PICTURE, PIXELS = "pairs.png", "pairs"
ORIGINALS = "-originals"  # ends the name of the folder with the originals' features
PAIRS = 8  # in the picture
LPIPS_WEIGHTS = "lpips_weights"  # in summary and record: SHA-256 of VGG16's weights, so that other weights are noticed


def evaluate_tokenizer(images: Images, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Compare the reconstructions of `evaluate.tokenizer` with their originals: up to `evaluate.images` images of `evaluate.split`, chosen
    by the hash of their keys.

    Metrics: the Fréchet distance of the two sets (`rfid` with Inception), `psnr`, `ssim` and, with `evaluate.lpips_weights`, `lpips`, each
    with its standard error. `evaluate.path` gets the record and its files, as every evaluation's. Returns the summary. Raises UserError for
    a tokenizer, weights or images that can't be used.
    """
    check_count("evaluate.images", evaluate.images)
    digest = network_digest(evaluate.features, evaluate.weights)
    lpips_digest = lpips_weights_digest(evaluate.lpips_weights) if evaluate.lpips_weights else ""
    size, stride = images.settings.size, _stride(evaluate.tokenizer)
    if size % stride:
        raise UserError(f"images.size is {size}, expected a multiple of {stride}, the stride of {evaluate.tokenizer!r}")
    require_workers({"evaluate.actors": evaluate.actors}, stage.cluster, cpus_each=0)
    chosen = chosen_images(images, evaluate.split, evaluate.images, at_most=True)
    rows = ImageRows(chosen.table.take(pa.array(uncertainty.fair_order(chosen.column("label")))))
    real = RealImages(images.settings, rows)
    reconstructed = ReconstructedImages(images.settings, rows, evaluate.tokenizer)
    identity = {
        "evaluate.features": identity_of(evaluate=evaluate)["evaluate.features"],
        "evaluate.split": evaluate.split,
        "network": digest,
        "tokenizer": tokenizer_digest(evaluate.tokenizer),
        "images": storage.digest(json.dumps([real.identity(), real.versions()], sort_keys=True).encode()),
    }
    finished = stage.begin(evaluate.path, identity, enough=lambda summary: lpips_digest in ("", summary.get(LPIPS_WEIGHTS)))
    if finished is not None:
        return finished
    stage.say(f"features of {len(real):,} images and of their reconstructions")
    path = features_path(evaluate.path, evaluate.features, digest)
    judges = Judges(evaluate.features, evaluate.weights, "", evaluate.actors, stage.cluster, [path + ORIGINALS])
    [originals] = features_of([real], judges, evaluate.batch, stage)
    pairs_path = storage.join(evaluate.path, f"{PIXELS}-lpips-{lpips_digest[:12]}" if lpips_digest else PIXELS)
    job = Reconstructing(evaluate.tokenizer, evaluate.lpips_weights, stage.cluster, pairs_path)
    kept, pairs = _reconstruct((real, reconstructed), job, replace(judges, kept=[path]), evaluate, stage)
    check_used(real, len(pairs["index"]), stage)
    found = measure_pairs(originals, kept, pairs, evaluate.features)
    storage.write_bytes(storage.join(evaluate.path, PICTURE), _picture(real, reconstructed))
    stage.artifact(storage.join(evaluate.path, PICTURE))
    record = {
        "standard_error_method": ERRORS,
        "reference": {**real.identity(), "images": len(pairs["index"]), "split": evaluate.split, "source": images.settings.source},
        "network": {"name": evaluate.features, "digest": digest},
        "tokenizer": {"path": evaluate.tokenizer, "digest": identity["tokenizer"], **tokenizer_config(evaluate.tokenizer)},
        "seed": stage.seed,
        "identity": identity,
    }
    figures = {LPIPS_WEIGHTS: lpips_digest} if lpips_digest else {}
    return write_record(found, figures, record, np.full(len(pairs["index"]), -1), evaluate, stage)


def _stride(path: str) -> int:
    tokenizer_digest(path)  # raises UserError where there is no tokenizer
    check_tokenizer_files(path)
    return load_tokenizer(storage.local_directory(path)).stride


def _reconstruct(
    sources: tuple[RealImages, ReconstructedImages], job: Reconstructing, judges: Judges, evaluate: EvaluateSettings, stage: Stage
) -> tuple[KeptFeatures, dict[str, np.ndarray]]:
    """The features of all reconstructions, and the metrics of the pairs; what an earlier attempt kept is not computed again."""
    import ray.data

    [path] = judges.kept
    (real, reconstructed), pairs_path = sources, job.kept
    wanted = ranges(len(real), evaluate.batch)
    done = {one for one in pairs_there(pairs_path).intersection(shards_there(path)) if is_whole(path, one, False)}
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
            with images_named([reconstructed]):
                for block in scored(dataset, judges):
                    seen += len(block["index"])
                    bar.update(seen)
    there = [one for one in wanted if one in pairs_there(pairs_path)]
    return KeptFeatures(path, tuple(there)), read_pairs(pairs_path, there)


@torch.inference_mode()
def _picture(real: RealImages, reconstructed: ReconstructedImages) -> bytes:
    """The first originals that can be read, above their reconstructions."""
    shown = min(PAIRS, len(real))
    originals = real.block(0, shown).images
    tokenizer = load_tokenizer(storage.local_directory(reconstructed.tokenizer))
    decoded = to_uint8(tokenizer.decode(tokenizer.moments(to_model(originals)).chunk(2, dim=1)[0]))
    return pairs_picture(np.stack([originals, decoded], axis=1))
