"""The stage *tokenize*, with the metrics of the trained tokenizer's reconstructions."""

from dataclasses import replace
from typing import Any, Literal

from pipelines.evaluation.features import network_digest
from pipelines.evaluation.reconstructions.stage import evaluate_tokenizer
from pipelines.evaluation.settings import EvaluateSettings
from pipelines.images.listing import Images
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import SUMMARY, Stage
from pipelines.tokenizing import stage as tokenizing
from pipelines.tokenizing.settings import TokenizerSettings

FOLDER = "evaluation"  # in tokenizer.path
MOST_IMAGES = 5_000
LITE: Literal["efficientnet-lite0"] = "efficientnet-lite0"  # its weights come with the extra demo


def tokenize(images: Images, tokenizer: TokenizerSettings, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Run `tokenizing.tokenize`, then evaluate the reconstructions of up to 5,000 held-out images, with the feature network
    `evaluate.features`, or with efficientnet-lite0 if that one's weights are missing.

    Without either network, or with fewer than two held-out images, the evaluation is left out, and the reason is printed.
    """
    summary = tokenizing.tokenize(images, tokenizer, stage)
    path = storage.join(tokenizer.path, FOLDER)
    if tokenizer.kind == "pixels" or storage.exists(storage.join(path, SUMMARY)):
        return summary
    later = f"`mar evaluate --tokenizer {tokenizer.path}` does it"
    judged, reason = _network(evaluate)
    if judged is None:
        stage.say(f"the reconstructions are not evaluated: {reason}; later {later}")
        return summary
    if reason:
        stage.say(f"the reconstructions are judged by {judged.features}: {reason}")
    if len(images.listing.held_out()) < 2:
        stage.say(f"the reconstructions are not evaluated: nothing is held out; {later} with --set evaluate.split=train")
        return summary
    count = min(evaluate.images, MOST_IMAGES)
    chosen = replace(judged, path=path, tokenizer=tokenizer.path, split="held_out", images=count)
    settings = replace(chosen, samples="", metrics=[])
    found = evaluate_tokenizer(images, settings, Stage(stage.name, stage.cluster, stage.configuration, seed=stage.seed))
    figures = {name: value for name, value in found.items() if name in ("psnr", "ssim", "lpips", "rfid") or "reconstruction" in name}
    stage.log({f"reconstruction/{name}": value for name, value in figures.items()}, step=tokenizer.images)
    return summary


def _network(evaluate: EvaluateSettings) -> tuple[EvaluateSettings | None, str]:
    """The settings with a feature network that there is (None if there is none), and why it is not `evaluate.features`."""
    reason = ""
    for settings in (evaluate, replace(evaluate, features=LITE)):
        try:
            network_digest(settings.features, settings.weights)
        except UserError as error:
            reason = reason or error.text.partition(": ")[0]
        else:
            return settings, reason
    return None, reason
