"""Where pure functions run: in this process where there is little to compute, else as Ray tasks."""

from collections.abc import Callable, Sequence
from typing import Any

FAN_IN = 4  # parts that one task merges


class Tasks:
    """Calls of functions. A result is passed on to other calls as it is; `results` waits for it."""

    def __init__(self, here: bool) -> None:
        """`here`: in this process, one after the other."""
        self.here = here

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start `function(*arguments)`; arguments may be results of other calls."""
        if self.here:
            return function(*arguments)
        import ray

        return ray.remote(function).options(num_cpus=1).remote(*arguments)

    def share(self, value: Any) -> Any:
        """A large value that many calls take."""
        if self.here:
            return value
        import ray

        return ray.put(value)

    def merged(self, parts: Sequence[Any], merge: Callable[..., Any]) -> Any:
        """`merge` of all parts in their order, as a tree of calls that take a few parts each."""
        parts = list(parts)
        while len(parts) > 1:
            groups = [parts[first : first + FAN_IN] for first in range(0, len(parts), FAN_IN)]
            parts = [self.call(merge, *group) if len(group) > 1 else group[0] for group in groups]
        return parts[0]

    def results(self, calls: Sequence[Any]) -> list[Any]:
        """The results of calls, in order. Raises what they raised."""
        if self.here:
            return list(calls)
        import ray

        found: list[Any] = ray.get(list(calls))
        return found
