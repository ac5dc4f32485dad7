"""The pictures of a page."""

import base64
from dataclasses import dataclass

from pipelines.runtime import storage


@dataclass
class Pictures:
    """Collects the page's pictures: each is written to `folder` as PNG and embedded in the page."""

    folder: str

    def add(self, name: str, data: bytes) -> str:
        """The picture as a `data:` URI."""
        storage.write_bytes(storage.join(self.folder, f"{name}.png"), data)
        return "data:image/png;base64," + base64.b64encode(data).decode()

    def copy(self, name: str, data: bytes | None) -> str | None:
        return self.add(name, data) if data else None
