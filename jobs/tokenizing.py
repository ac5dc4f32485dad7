"""The stage *tokenize*, with the metrics of the trained tokenizer's reconstructions."""

from dataclasses import replace
from typing import Any

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


def tokenize(images: Images, tokenizer: TokenizerSettings, evaluate: EvaluateSettings, stage: Stage) -> dict[str, Any]:
    """Run `tokenizing.tokenize`, then evaluate the reconstructions of up to 5,000 held-out images, with the feature network
    `evaluate.features`.

    Without the network, or with fewer than two held-out images, the evaluation is left out, and the reason is printed.
    """
    summary = tokenizing.tokenize(images, tokenizer, stage)
    path = storage.join(tokenizer.path, FOLDER)
    if tokenizer.kind == "pixels" or storage.exists(storage.join(path, SUMMARY)):
        return summary
    later = f"`mar evaluate --tokenizer {tokenizer.path}` does it"
    try:
        network_digest(evaluate.features, evaluate.weights)
    except UserError as error:
        stage.say(f"the reconstructions are not evaluated: {error.text}; later {later}")
        return summary
    if len(images.listing.held_out()) < 2:
        stage.say(f"the reconstructions are not evaluated: nothing is held out; {later} with --set evaluate.split=train")
        return summary
    settings = replace(
        evaluate, path=path, tokenizer=tokenizer.path, split="held_out", images=min(evaluate.images, MOST_IMAGES), samples="", metrics=[]
    )
    found = evaluate_tokenizer(images, settings, Stage(stage.name, stage.cluster, stage.configuration, seed=stage.seed))
    figures = {name: value for name, value in found.items() if name in ("psnr", "ssim", "lpips", "rfid") or "reconstruction" in name}
    stage.log({f"reconstruction/{name}": value for name, value in figures.items()}, step=tokenizer.images)
    return summary
