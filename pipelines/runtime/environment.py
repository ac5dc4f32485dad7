"""Environment variables that are set for a while, because Ray, Tune and MLflow read their settings there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(wanted: Mapping[str, str], override: bool = False) -> Iterator[None]:
    """Set these variables for the body, and restore what was there before. Variables that the user has set are left alone unless
    `override`."""
    before = {name: os.environ.get(name) for name in wanted if override or name not in os.environ}
    os.environ.update({name: wanted[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
