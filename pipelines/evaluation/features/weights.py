"""Weights files of feature networks, checked by their digest."""

import hashlib

from pipelines.runtime import storage
from pipelines.runtime.errors import UserError

DIGEST_GIVEN = "#sha256="  # after a path: the first digits of the SHA-256 that the file must have


def weights_bytes(network: str, weights: str, remedy: str, published: str = "", setting: str = "evaluate.weights") -> bytes:
    """The bytes of the file `weights` of a feature network, which `setting` names. `PATH#sha256=DIGEST` names the digest that the file must
    have, in place of the `published` one, if that is known; both are first digits of a SHA-256.

    Raises UserError if there is no file, or if it has another digest; the error ends with `remedy`.
    """
    path, _, given = weights.partition(DIGEST_GIVEN)
    expected = given or published
    if not path or not storage.exists(path):
        found = "is not set" if not path else f"{path!r} is not there"
        raise UserError(f"{network} needs its weights file, and {setting} {found}: {remedy}")
    data = storage.read_bytes(path)
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(expected):
        raise UserError(f"{setting} {path!r} has the SHA-256 {digest[:16]}…, expected {expected}…: {remedy}")
    return data
