"""A tokenizer directory: its files and its digest."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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


def require_tokenizer(path: str, expected: str, user: str) -> str:
    """Check that the tokenizer in directory `path` has the digest `expected`, that of the tokenizer with which `user` was made, e.g.
    "checkpoint X", or makes the same latents (see `latents_digest`). Returns its digest.

    Raises UserError where it is another tokenizer, and DamagedFileError where its files are damaged."""
    found = tokenizer_digest(path)
    if expected not in (found, latents_digest(path)):
        check_tokenizer_files(path)
        raise UserError(
            f"{user} was made with the tokenizer of digest {expected[:12]}…, but {path!r} holds {found[:12]}…", remedy="name that tokenizer"
        )
    return found


LATENTS = "latents.json"  # of a tokenizer whose decoder alone was trained: `digest` of the tokenizer that its encoder is from, `encoder`
ENCODER = ("encoder.", "quant_conv.", "quantize.")  # the weights that decide the latents and their codes


def initial_weights(path: str) -> dict[str, Tensor]:
    """The weights of the tokenizer in directory `path`, by name. Raises UserError where there is none or it is damaged."""
    try:
        return dict(load_tokenizer(storage.local_directory(path)).state_dict())
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer.init_from {path!r} can't be loaded: {error}", remedy="name a tokenizer's directory") from error


def encoder_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the weights that decide the latents: those of encoder, `quant_conv` and codebook."""
    digest = hashlib.sha256()
    for name in sorted(name for name in weights if name.startswith(ENCODER)):
        digest.update(f"{name} {tuple(weights[name].shape)}\n".encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def keep_latents(path: str, source: str) -> None:
    """Record in the tokenizer directory `path` that it makes the latents of the tokenizer in directory `source`.

    Raises ValueError where the weights that decide them differ."""
    digests = [encoder_digest(initial_weights(one)) for one in (path, source)]
    if digests[0] != digests[1]:
        raise ValueError(f"the encoder of {path} is not that of {source}")
    storage.write_json(storage.join(path, LATENTS), {"digest": latents_digest(source), "encoder": digests[0]})


def latents_digest(path: str) -> str:
    """The digest under which caches and checkpoints know the latents of the tokenizer in directory `path`: its own, or, where its decoder
    alone was trained (`tokenizer.train=decoder`) and its encoder is still the recorded one, that of the tokenizer that it started from."""
    record = storage.join(path, LATENTS)
    if storage.exists(record):
        kept = storage.read_json(record, dict[str, str], f"delete it; then {path!r} is a tokenizer with latents of its own")
        if encoder_digest(initial_weights(path)) == kept.get("encoder"):
            return str(kept["digest"])
    return tokenizer_digest(path)
