"""The head node of a Ray cluster: whether it answers, and its authentication token."""

import os
import socket
from pathlib import Path

CONNECT_SECONDS = 10.0


def unreachable(host: str, port: int) -> str:
    """Why a connection to host:port fails; empty if it succeeds. Ray itself would retry for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def auth_token() -> str:
    """The token, from the same sources and in the same order as Ray reads it; empty if none is set."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else ""
