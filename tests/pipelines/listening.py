"""A stage whose lines a test can read."""

from pipelines.runtime.cluster.settings import ClusterSettings
from pipelines.runtime.stage import Stage


class Listening(Stage):
    """Untracked; remembers what it said."""

    def __init__(self, cluster: ClusterSettings, seed: int = 0) -> None:
        super().__init__("test", cluster, seed=seed)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
