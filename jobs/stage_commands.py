"""The stages as commands: what each reads and writes, and the function that implements it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCommand:
    """One stage. `function` is `module:name`; it takes the `arguments` (see `jobs.stages`) by name, and `stage`."""

    function: str
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    help: str
    example: str


STAGES = {
    "tokenize": StageCommand(
        "jobs.tokenizing:tokenize",
        ("images", "tokenizer", "evaluate"),
        ("images.source",),
        "tokenizer.path",
        "Train the tokenizer, a KL autoencoder, on images.",
        "mar tokenize --preset demo --set tokenizer.path=runs/tokenizer",
    ),
    "cache": StageCommand(
        "pipelines.caching.stage:cache",
        ("images", "tokenizer_path", "cache"),
        ("images.source", "tokenizer.path"),
        "cache.path",
        "Encode every image once into the latent cache.",
        "mar cache --preset demo --set cache.encoders=2",
    ),
    "train": StageCommand(
        "jobs.training:train",
        ("images", "tokenizer_path", "cache", "model", "train", "generate", "evaluate"),
        ("cache.path", "tokenizer.path"),
        "train.path",
        "Train a MAR model on the cache, or resume training.",
        "mar train --preset demo --set train.workers=1",
    ),
    "generate": StageCommand(
        "pipelines.generation.stage:generate",
        ("tokenizer_path", "train_path", "generate"),
        ("train.path", "tokenizer.path"),
        "generate.path",
        "Draw samples of given classes from a checkpoint.",
        "mar generate --preset demo --label 3 --label 7 --film",
    ),
    "evaluate": StageCommand(
        "pipelines.evaluation.curve.stage:evaluate",
        ("images", "tokenizer_path", "train_path", "generate", "evaluate"),
        ("images.source", "train.path", "tokenizer.path"),
        "evaluate.path",
        "Compare samples with a reference: FID and more.",
        "mar evaluate --preset demo --set evaluate.path=runs/evaluation",
    ),
    "sweep": StageCommand(
        "pipelines.sweeping.stage:sweep",
        ("sections", "sweep"),
        ("images.source", "cache.path", "tokenizer.path", "train.path"),
        "sweep.path",
        "Compare settings of training or generation.",
        "mar sweep --preset demo --set sweep.path=runs/sweep",
    ),
}  # fmt: skip
