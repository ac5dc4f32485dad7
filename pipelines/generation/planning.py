"""Find the checkpoint and the tokenizer that samples are drawn with, and check them against each other and the settings."""

import difflib
from collections.abc import Sequence

from mar_model.checkpoints.checkpoint import weights_file
from pipelines.checkpoints.directory import read_checkpoint
from pipelines.checkpoints.released import chosen_checkpoint, with_tokenizer
from pipelines.generation.drawing import Drawing
from pipelines.generation.settings import GenerateSettings
from pipelines.runtime.errors import UserError
from pipelines.runtime.stage import Stage
from pipelines.tokenizing.directory import require_tokenizer


def plan_drawing(
    path: str,
    tokenizer: str,
    train_path: str,
    generate: GenerateSettings,
    stage: Stage,
    labels: Sequence[int | str] = (),
    files: bool = False,
) -> Drawing:
    """Find the checkpoint (`generate.checkpoint`, or the newest in `train_path`) and check it against the labels (none: every class in
    turn) and the tokenizer in directory `tokenizer`. Damaged checkpoints that are newer are named by `stage.say`. Samples are written to
    `path`, with `files` as PNG files too.

    Raises UserError where there is no checkpoint, the tokenizer is not the one it was trained with, or a label is no class.
    """
    checkpoint = chosen_checkpoint(generate.checkpoint, train_path, stage.say)
    try:
        state = read_checkpoint(checkpoint)
        weights_file(state, generate.ema, generate.ema_decay)
    except ValueError as error:
        raise UserError(
            f"generate.checkpoint {checkpoint!r}: {error}", remedy="name a checkpoint, or none for the newest of train.path"
        ) from error
    state = with_tokenizer(state, tokenizer)
    trained_with = state["tokenizer"]
    require_tokenizer(tokenizer, trained_with["digest"], f"checkpoint {checkpoint} (tokenizer then at {trained_with['path']!r})")
    classes = state["model"]["classes"]
    found_labels = [_label(label, state.get("class_names") or [], classes) for label in labels]
    drawing = Drawing(path, checkpoint, state, tokenizer, generate, found_labels or list(range(classes)), stage.seed, stage.cluster, files)
    if drawing.unconditional and generate.guidance != 1.0:
        raise UserError(
            f"generate.guidance is {generate.guidance}, but {checkpoint} was trained without labels (model.label_drop 1): there is no "
            "class to be guided to",
            remedy="set generate.guidance=1",
        )
    return drawing


def _label(label: int | str, names: list[str], classes: int) -> int:
    """The number of a class given by number or name."""
    if isinstance(label, int):
        if not 0 <= label < classes:
            raise UserError(f"generate.labels has {label}, the checkpoint's classes are 0 to {classes - 1}")
        return label
    if label not in names:
        near = difflib.get_close_matches(label, names, 1, 0.0)
        known = f"the checkpoint knows no such class; nearest: {near[0]!r}" if near else "the checkpoint's classes have numbers only"
        raise UserError(f"generate.labels has {label!r}, {known}")
    return names.index(label)
