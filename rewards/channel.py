"""Whole messages over a stream socket: an 8-byte length, then the pickled object."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")
_AT_ONCE = 1 << 18  # bytes


class Channel:
    """One end of a socket pair between a process and a child it started.

    :meth:`receive` waits for one message; :meth:`drain` takes what is there and never waits, even
    if the other side stopped in the middle of a message.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._buffer = bytearray()

    def send(self, message: Any, timeout: float | None = None) -> None:
        """Send one message.

        Raises:
            OSError: the other side is gone, or did not read it within ``timeout`` seconds.
        """
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.socket.settimeout(timeout)
        self.socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, timeout: float | None = None) -> Any:
        """Wait for one message.

        Raises:
            EOFError: the other side is gone.
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        self.socket.settimeout(timeout)
        while True:
            message = self._take()
            if message is not None:
                return pickle.loads(message)
            data = self.socket.recv(_AT_ONCE)
            if not data:
                raise EOFError("the other process closed the channel")
            self._buffer += data

    def drain(self) -> tuple[list[Any], bool]:
        """(messages that have arrived whole, whether the other side is gone)."""
        closed = False
        self.socket.setblocking(False)
        while True:
            try:
                data = self.socket.recv(_AT_ONCE)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                closed = True
                break
            self._buffer += data
        messages = []
        while (message := self._take()) is not None:
            messages.append(pickle.loads(message))
        return messages, closed

    def close(self) -> None:
        self.socket.close()

    def _take(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return message
