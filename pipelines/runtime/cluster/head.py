"""The head node of a Ray cluster: whether it answers, and the token that it asks for."""

import os
import socket
from pathlib import Path

CONNECT_SECONDS = 10.0


def unreachable(host: str, port: int) -> str:
    """Why nothing listens at host:port, empty where something does. Ray itself would try for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def auth_token() -> str:
    """The token in the places where Ray looks, in its order; empty if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else ""
