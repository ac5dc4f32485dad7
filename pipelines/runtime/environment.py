"""Temporary environment variables, from which Ray, Tune and MLflow read settings."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(wanted: Mapping[str, str], override: bool = False) -> Iterator[None]:
    """Set these variables for the body, then restore the previous values. Variables that are already set keep their values unless
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
