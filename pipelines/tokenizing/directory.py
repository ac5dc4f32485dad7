"""A tokenizer directory: its files and its digest."""

import tempfile
from pathlib import Path
from typing import Any

from mar_model.tokenizers import PixelTokenizer, load_tokenizer, network_config, save_tokenizer
from pipelines.runtime import storage
from pipelines.runtime.errors import DamagedFileError, UserError
from pipelines.runtime.records import damaged

ANOTHER_TOKENIZER = "bring it back from a copy, or delete the tokenizer's directory and make it again with `mar tokenize` or `mar import`"


def tokenizer_digest(path: str) -> str:
    """SHA-256 over the bytes of `config.json` and, where there is one, `tokenizer.safetensors` of a tokenizer directory.

    Raises UserError where there is no `config.json`."""
    config, weights = storage.join(path, "config.json"), storage.join(path, "tokenizer.safetensors")
    if not storage.exists(config):
        raise UserError(
            f"{path!r} holds no tokenizer: {config} is missing", remedy="run `mar tokenize`, or name a tokenizer in tokenizer.path"
        )
    return storage.digest(storage.read_bytes(config) + (storage.read_bytes(weights) if storage.exists(weights) else b""))


def write_pixels(path: str) -> None:
    """Make `path` the directory of the tokenizer that leaves pixels as they are."""
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(PixelTokenizer(), Path(temporary))
        storage.write_bytes(storage.join(path, "config.json"), (Path(temporary) / "config.json").read_bytes())


def tokenizer_config(path: str) -> dict[str, Any]:
    """`config.json` of the tokenizer in directory `path`. Raises FileNotFoundError, and DamagedFileError."""
    file = storage.join(path, "config.json")
    config: dict[str, Any] = storage.read_json(file, dict[str, Any], ANOTHER_TOKENIZER)
    try:
        network_config(config)
    except ValueError as error:
        raise damaged(file, f"it {error}", ANOTHER_TOKENIZER) from error
    return config


def check_tokenizer_files(path: str) -> None:
    """Load the tokenizer in directory `path`. Raises DamagedFileError where it can't be loaded, naming the file."""
    try:
        load_tokenizer(storage.local_directory(path))
    except (OSError, ValueError) as error:
        raise DamagedFileError(str(error), ANOTHER_TOKENIZER) from error


def require_tokenizer(path: str, expected: str, user: str) -> None:
    """Check that the tokenizer in directory `path` has the digest `expected`, that of the tokenizer with which `user` was made, e.g.
    "checkpoint X". Raises UserError where it has another, and DamagedFileError where its files are damaged."""
    found = tokenizer_digest(path)
    if found != expected:
        check_tokenizer_files(path)
        raise UserError(
            f"{user} was made with the tokenizer of digest {expected[:12]}…, but {path!r} holds {found[:12]}…", remedy="name that tokenizer"
        )
