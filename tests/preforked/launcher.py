"""What the raylet starts in the place of Ray's `setup_worker.py`; lives as long as the worker. Imports next to nothing: this is quick."""

import importlib.util
import json
import os
import socket
import sys

PREFIX = "--serialized-runtime-env-context="


def context() -> dict[str, object]:
    """The worker's runtime environment."""
    given = [one.removeprefix(PREFIX) for one in sys.argv if one.startswith(PREFIX)]
    found: dict[str, object] = json.loads(given[0]) if given else {}
    return found


def launch(path: str, variables: dict[str, str]) -> bool:
    """Whether a worker was forked, which has ended now."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:  # the server is gone
            return False
        arguments = [one for one in sys.argv[1:] if not one.startswith((PREFIX, "--language="))]
        wanted = {"arguments": arguments, "environment": {**os.environ, **variables}, "folder": os.getcwd()}
        socket.send_fds(connection, [b" "], [1, 2])
        connection.sendall(json.dumps(wanted).encode() + b"\n")
        connection.recv(1)
    return True


def main() -> None:
    path, environment = os.environ.get("MAR_TESTS_PREFORKED"), context()
    variables = environment.get("env_vars") or {}
    plain = "--language=PYTHON" in sys.argv and not environment.get("command_prefix") and "PYTHONPATH" not in variables
    if path and plain and launch(path, variables):
        return
    ray = importlib.util.find_spec("ray")
    setup = os.path.join(os.path.dirname(ray.origin), "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, setup, *sys.argv[1:]])


main()
