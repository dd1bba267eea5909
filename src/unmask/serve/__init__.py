"""The playground: a web page and a JSON API for trained models, on this machine only.

The socket is bound here, without the packages that the server needs, so that a busy port is reported at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from unmask.core.errors import RecipeError

HOST: Final = "127.0.0.1"
_PORTS_TO_TRY: Final = 100


@contextmanager
def bind_port(port: int) -> Generator[socket.socket]:
    """Yield a socket that is bound to a port of the loopback address; with 0, to any free one.

    Raises:
        RecipeError: the port is in use or not allowed.
    """
    listener = _open_socket()
    try:
        try:
            listener.bind((HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                message = f"port {port} can't be used: {error.strerror}"
                raise RecipeError(message, location="--port", hint="use a port from 1024 to 65535") from error
            raise RecipeError(
                f"port {port} is in use", location="--port", hint=f"use the next free one: --port {_free_port(port)}"
            ) from error
        yield listener
    finally:
        listener.close()


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # so that a restarted server gets its port back at once; elsewhere it would share the port
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return opened


def _free_port(port: int) -> int:
    """Return the next free port after one that is in use; 0, any free port, if there is none near."""
    for candidate in range(port + 1, min(port + _PORTS_TO_TRY, 65536)):
        with _open_socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, candidate))
            return candidate
    return 0
