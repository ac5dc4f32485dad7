"""Messages between Ray workers and the driver."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def on_this_node() -> "NodeAffinitySchedulingStrategy":
    """Where actors belong that must live as long as the driver: Ray puts one that takes no CPU on any node, also one that is lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Messages:
    """The actor behind `MetricsChannel`."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def put(self, message: dict[str, Any]) -> None:
        self._messages.put_nowait(message)

    async def get(self) -> dict[str, Any]:
        return await self._messages.get()


class MetricsChannel:
    """Carries metrics from Ray workers to the driver, which alone writes them down. Made in the driver, sent to the workers."""

    actor_class: type[Messages] = Messages

    def __init__(self) -> None:
        import ray

        self._actor: Any = ray.remote(self.actor_class).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()

    def send(self, metrics: dict[str, Any]) -> None:
        """From a worker; does not wait for the driver."""
        self._actor.put.remote(metrics)

    def say(self, text: str) -> None:
        """A line for the person, as the message {"say": text}."""
        self.send({"say": text})

    @contextmanager
    def listening(self, callback: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """In the driver: `callback` gets each message, one after the other, on a thread of its own, until the body ends.

        An exception in the callback is raised at the end of the body.
        """
        import ray

        errors = list[BaseException]()

        def listen() -> None:
            try:
                while message := ray.get(self._actor.get.remote()):
                    callback(message)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=listen, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            time.sleep(0.2)  # what was sent before the end may still be on its way
            self.send({})
            thread.join(timeout=30)
            ray.kill(self._actor)
        if errors:
            raise errors[0]
