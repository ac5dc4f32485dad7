"""Messages between Ray workers and the driver."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_this_node() -> "NodeAffinitySchedulingStrategy":
    """Scheduling strategy for actors that must live as long as the driver. Without it, Ray may place an actor that requests no CPU on
    another node, where a node failure would end it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@dataclass(frozen=True)
class Said:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Metrics:
    """A worker's metrics over the interval that ended at `images_seen` images; `values` contains `images_seen` too."""

    values: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.values["images_seen"])


class Messages:
    """The actor behind `MessageChannel`."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[object] = asyncio.Queue()

    async def put(self, message: object) -> None:
        self._messages.put_nowait(message)

    async def get(self) -> object:
        return await self._messages.get()


class MessageChannel:
    """Carries messages from Ray workers to the driver: small typed objects, such as `Said` and `Metrics`. The driver creates the channel
    and passes it to the workers."""

    actor_class: type[Messages] = Messages

    def __init__(self) -> None:
        import ray

        self._actor: Any = ray.remote(self.actor_class).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()

    def send(self, message: object) -> None:
        """Send a message from a worker, without waiting for the driver."""
        self._actor.put.remote(message)

    def say(self, text: str) -> None:
        """Send `Said(text)`."""
        self.send(Said(text))

    @contextmanager
    def listening(self, callback: Callable[[Any], None]) -> Iterator[None]:
        """In the driver, call `callback` with each message, in order, on a separate thread until the body ends.

        An exception in the callback is raised at the end of the body.
        """
        import ray

        errors = list[BaseException]()

        def listen() -> None:
            try:
                while (message := ray.get(self._actor.get.remote())) is not None:
                    callback(message)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=listen, name="messages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            time.sleep(0.2)  # messages sent before the end may still be in transit
            self.send(None)
            thread.join(timeout=30)
            ray.kill(self._actor)
        if errors:
            raise errors[0]
