"""Stage *evaluate*: given samples, one checkpoint, or every kept checkpoint of a training run."""

from dataclasses import replace
from typing import Any

from pipelines.checkpoints.directory import checkpoint_names
from pipelines.evaluation.curve.points import CURVE, FORMAT_VERSION, REMEDY, EvaluationOfCheckpoint, draw_curve, finished_points
from pipelines.evaluation.features import network_digest
from pipelines.evaluation.given_samples import evaluate_given
from pipelines.evaluation.reconstructions.stage import evaluate_tokenizer
from pipelines.evaluation.record import RECORD, has_metrics, tags_of
from pipelines.evaluation.references.find import find_reference
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.evaluation.stage import evaluate as evaluate_one
from pipelines.evaluation.stage import scoring_identity, with_reference
from pipelines.generation.settings import GenerateSettings
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.cluster.precision import resolved
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import null_for_nan
from pipelines.runtime.stage import Stage, read_summary
from pipelines.tokenizing.directory import tokenizer_digest

OF_THE_STAGE = ("format_version", "stage", "seconds", "identity")  # in every summary


def evaluate(
    images: Images, tokenizer_path: str, train_path: str, generate: GenerateSettings, evaluate: EvaluateSettings, stage: Stage
) -> dict[str, Any]:
    """Evaluate what the settings name: given samples (`evaluate.samples`, see `evaluate_given`), the reconstructions of a tokenizer
    (`evaluate.tokenizer`, see `evaluate_tokenizer`), the samples of one checkpoint (`evaluate.checkpoints=newest`, see
    `pipelines.evaluation.stage.evaluate`) or of every kept one (`all`, see `evaluate_all`). Raises UserError for contradicting settings.
    """
    given = {"evaluate.samples": evaluate.samples, "evaluate.tokenizer": evaluate.tokenizer}
    if all(given.values()):
        raise UserError("both evaluate.samples and evaluate.tokenizer are given", remedy="leave one of them empty")
    if evaluate.checkpoints == "all":
        for name, value in {**given, "generate.checkpoint": generate.checkpoint}.items():
            if value:
                raise UserError(f"evaluate.checkpoints is 'all', but {name} is {value!r}", remedy="reset one of them")
        return evaluate_all(images, tokenizer_path, train_path, generate, evaluate, stage)
    if evaluate.tokenizer:
        return evaluate_tokenizer(images, evaluate, stage)
    if evaluate.samples:
        return evaluate_given(images, tokenizer_path, evaluate, stage)
    return evaluate_one(images, tokenizer_path, train_path, generate, evaluate, stage)


def evaluate_all(
    images: Images, tokenizer_path: str, train_path: str, generate: GenerateSettings, evaluate: EvaluateSettings, stage: Stage
) -> dict[str, Any]:
    """Evaluate every checkpoint in `train_path` that is not yet evaluated, each in `evaluate.path/images-…`, and write `curve.json`,
    `curve.png` and `curve.svg` with all of them; MLflow gets each metric at the checkpoint's images seen. Damaged checkpoints are skipped,
    which is logged. Returns the summary: that of the newest checkpoint, and `checkpoints`, the names of all. Raises UserError if there is
    no checkpoint.
    """
    names = checkpoint_names(train_path)
    if not names:
        raise UserError(f"evaluate.checkpoints is 'all', but train.path {train_path!r} holds none", remedy="run `mar train` first")
    digest = network_digest(evaluate.features, evaluate.weights)
    reference = find_reference(images, tokenizer_path, evaluate, digest)
    drawn = replace(generate, precision=resolved(generate.precision, stage.cluster))
    identity = {
        **scoring_identity(reference, drawn, evaluate, digest),
        "evaluate.checkpoints": "all",
        "tokenizer": tokenizer_digest(tokenizer_path),
        "seed": stage.seed,
    }

    def enough(summary: dict[str, Any]) -> bool:
        return set(names) <= set(summary["checkpoints"]) and has_metrics(summary, evaluate)

    finished = stage.begin(evaluate.path, identity, enough)
    if finished is not None:
        return finished
    measured = with_reference(images, tokenizer_path, evaluate, stage)
    skipped = []
    for name in names:
        stage.say(f"checkpoint {name}")
        one = replace(measured, path=storage.join(evaluate.path, name), checkpoints="newest")
        checkpoint = storage.join(train_path, "checkpoints", name)
        own = Stage(stage.name, stage.cluster, stage.configuration, seed=stage.seed)
        try:
            evaluate_one(images, tokenizer_path, train_path, replace(generate, checkpoint=checkpoint), one, own, shared=evaluate.path)
        except UserError as error:
            if isinstance(error.__cause__, ValueError) or not storage.exists(checkpoint):  # damaged, or deleted by the training run
                stage.say(f"checkpoint {name} skipped: {error.text}")
                skipped.append(name)
                continue
            raise
    return _finish(evaluate, identity, skipped, stage)


def _finish(evaluate: EvaluateSettings, identity: dict[str, Any], skipped: list[str], stage: Stage) -> dict[str, Any]:
    """Write the curve and the summary."""
    points = finished_points(evaluate.path)
    if not points:
        raise UserError(f"none of the checkpoints {', '.join(skipped)} can be used", remedy="restore one from a copy")
    for point in points:
        errors = {f"{name}_standard_error": error for name, error in point["standard_errors"].items()}
        stage.log({**point["metrics"], **errors}, step=point["images_seen"])
    about = {"images": evaluate.images, "features": evaluate.features, "points": points}
    storage.write_json(storage.join(evaluate.path, CURVE), null_for_nan({"format_version": FORMAT_VERSION, **about}))
    for file, data in draw_curve(points).items():
        storage.write_bytes(storage.join(evaluate.path, file), data)
        stage.artifact(storage.join(evaluate.path, file))
    newest = points[-1]["checkpoint"]
    stage.tag(tags_of(storage.read_json(storage.join(evaluate.path, newest, RECORD), EvaluationOfCheckpoint, REMEDY)))
    summary = read_summary(storage.join(evaluate.path, newest), "run the same command again")
    kept = {name: value for name, value in summary.items() if name not in OF_THE_STAGE}
    checkpoints = {"newest": newest, "checkpoints": [point["checkpoint"] for point in points], "skipped": skipped}
    return stage.complete(evaluate.path, identity, {**kept, **checkpoints})
