"""Where the pages of this package are served."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; ValueError for one that cannot be had."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ValueError(f"cannot listen at {host}, port {port} ({reason}): give another --port or --host") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for its second half
    return listening
