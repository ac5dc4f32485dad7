"""A tokenizer directory: its files and its digest."""

import tempfile
from pathlib import Path

from mar_model.tokenizers import PixelTokenizer, save_tokenizer
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError


def tokenizer_digest(path: str) -> str:
    """SHA-256 over the bytes of `config.json` and, where there is one, `tokenizer.safetensors` of a tokenizer directory.

    Raises UserError where there is no `config.json`."""
    config, weights = storage.join(path, "config.json"), storage.join(path, "tokenizer.safetensors")
    if not storage.exists(config):
        raise UserError(
            f"{path!r} holds no tokenizer: {config} is missing", remedy="run `mar tokenize`, or name a tokenizer in tokenizer.path"
        )
    return storage.digest(storage.read_bytes(config) + (storage.read_bytes(weights) if storage.exists(weights) else b""))


def _write_pixels(path: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(PixelTokenizer(), Path(temporary))
        storage.write_bytes(storage.join(path, "config.json"), (Path(temporary) / "config.json").read_bytes())
