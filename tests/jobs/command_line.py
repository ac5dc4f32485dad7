"""What one `mar …` came to, and the types of the fixtures."""

from collections.abc import Callable
from dataclasses import dataclass

from jobs.config.schema import RunConfig


@dataclass
class Result:
    status: int
    out: str
    err: str


Mar = Callable[..., Result]
DemoIn = Callable[..., RunConfig]
