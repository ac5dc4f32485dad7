"""Finds the checkpoint and the tokenizer for generation, and checks them against each other and the settings."""

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
    """Find the checkpoint (`generate.checkpoint`, or the newest in `train_path`), and check it against the labels (empty: all classes in
    turn) and the tokenizer in directory `tokenizer`. `stage.say` prints a line for each newer checkpoint that is damaged. Samples are
    written to `path`, with `files` also as PNG files.

    Raises UserError if there is no checkpoint, if it was trained with another tokenizer, or if a label is not a class.
    """
    checkpoint = chosen_checkpoint(generate.checkpoint, train_path, stage.say)
    try:
        state = read_checkpoint(checkpoint)
        weights_file(state, generate.ema, generate.ema_decay)
    except ValueError as error:
        raise UserError(
            f"generate.checkpoint {checkpoint!r}: {error}",
            remedy="choose another checkpoint, or leave generate.checkpoint empty for the newest in train.path",
        ) from error
    state = with_tokenizer(state, tokenizer)
    trained_with = state["tokenizer"]
    found = require_tokenizer(tokenizer, trained_with["digest"], f"checkpoint {checkpoint} (tokenizer then at {trained_with['path']!r})")
    state = {**state, "tokenizer": {**trained_with, "digest": found}}  # another decoder may draw its latents, which makes other samples
    classes = state["model"]["classes"]
    found_labels = [_label(label, state.get("class_names") or [], classes) for label in labels]
    drawing = Drawing(path, checkpoint, state, tokenizer, generate, found_labels or list(range(classes)), stage.seed, stage.cluster, files)
    if drawing.unconditional and generate.guidance != 1.0:
        raise UserError(
            f"generate.guidance is {generate.guidance}, but {checkpoint} was trained without labels (model.label_drop 1), so that there is "
            "no class for guidance",
            remedy="set generate.guidance=1",
        )
    return drawing


def _label(label: int | str, names: list[str], classes: int) -> int:
    """The index of a class given by index or name."""
    if isinstance(label, int):
        if not 0 <= label < classes:
            raise UserError(f"generate.labels contains {label}, expected 0 to {classes - 1} as in the checkpoint")
        return label
    if label not in names:
        near = difflib.get_close_matches(label, names, 1, 0.0)
        known = f"the checkpoint has no such class; nearest: {near[0]!r}" if near else "the checkpoint's classes have only numbers"
        raise UserError(f"generate.labels contains {label!r}, but {known}")
    return names.index(label)
