"""Ports at which processes meet."""

import socket


def keep_port() -> socket.socket:
    """A socket with a free port of this machine, which nobody else is given until it is closed.

    It does not listen: those who meet may.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    return kept
