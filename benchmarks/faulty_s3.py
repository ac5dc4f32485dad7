"""An S3 server on the loopback that fails a share of the requests."""

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KINDS = ("500", "503", "reset", "stall")


class _Handler(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        """Log nothing; the requests are counted."""

    def connection_dropped(self, *_: object) -> None:
        self.close_connection = True  # no socket to read the next request from


class FaultyS3:
    """Fail a `share` of the requests (only of `methods`, if given), cycling through `kinds`. A stalled request is answered after `stall`
    seconds."""

    def __init__(self) -> None:
        self.share, self.kinds, self.stall = 0.0, KINDS, 3.0
        self.methods: tuple[str, ...] = ()
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._lock = threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=_Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "FaultyS3":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            due = int(self.requests * self.share) > int((self.requests - 1) * self.share)  # evenly spaced, so that tests know the number
            fails = due and (not self.methods or environ["REQUEST_METHOD"] in self.methods)
            kind = self.kinds[sum(self.faults.values()) % len(self.kinds)] if fails else ""
            if kind:
                self.faults[kind] += 1
        if kind in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # unread data would be parsed as the next request
            start_response(f"{kind} Fault", [("Content-Type", "text/plain"), ("Content-Length", "7")])
            return [b"a fault"]
        if kind == "reset":
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
            os.close(connection.detach())  # `close` would wait for the files made from the socket
            raise ConnectionAbortedError
        if kind == "stall":
            time.sleep(self.stall)
        return self._app(environ, start_response)  # type: ignore[no-any-return]
