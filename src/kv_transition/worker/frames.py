"""The protocol of client and worker: JSON values, each preceded by its length. Nothing is unpickled."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

LONGEST = 16 * 2**20
"""largest number of bytes of a value; a longer one does not come from a client of this package"""
_LENGTH = struct.Struct(">I")

TAKEN, DONE, AGAIN, STOPPED, UNABLE = "taken", "done", "again", "stopped", "unable"
"""states of a job that a worker reports: started; finished, with its exit status; to be run again without a worker;
ended because its client or its run has gone; not started, because this worker cannot run any job"""


def send(connection: socket.socket, value: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Send a value and open files. Raises OSError if the other side has closed the connection."""
    body = json.dumps(value).encode()
    head = _LENGTH.pack(len(body))
    if files:
        socket.send_fds(connection, [head], list(files))
    else:
        connection.sendall(head)
    connection.sendall(body)


def receive(connection: socket.socket, files: int = 0) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next value and up to ``files`` open files sent with it; None if the connection is closed.

    Raises ValueError if the data are not a value of this protocol.
    """
    head, fds = b"", []
    while len(head) < _LENGTH.size:
        piece, got, _, _ = socket.recv_fds(connection, _LENGTH.size - len(head), files)
        fds += got
        if not piece:
            return None
        head += piece
    (length,) = _LENGTH.unpack(head)
    if length > LONGEST:
        raise ValueError(f"a value of {length} bytes")
    body = bytearray()
    while len(body) < length:
        piece = connection.recv(min(length - len(body), 2**16))
        if not piece:
            return None
        body += piece
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value, fds
