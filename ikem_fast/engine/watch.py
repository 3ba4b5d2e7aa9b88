"""Tells all ranks when one of them ends before its time, whatever they are waiting in and whatever they wait with."""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch.distributed import Store

_STORE_KEY = "ikem_fast/watch"
_CONNECT_SECONDS = 900.0
_GREETING_SECONDS = 10.0
# How long the main thread of a process may take to notice by itself that another rank is gone.
_GRACE_SECONDS = 10.0
EXIT_STATUS = 2


class Watch:
    """Connections between rank 0 and all others; the system closes a process's however it ends.

    A thread of every rank waits for the ends of the others. When it hears of one, it is up to the main thread to end
    the process: communication with a rank that is gone is an error. Where that takes longer than ``_GRACE_SECONDS``, as
    in a collective on a GPU that nothing can interrupt, the thread does it.

    Args:
        rank: of this process.
        peers: a connected socket for each rank to watch.
        session: what no other attempt of the same processes has.

    Attributes:
        session: likewise, the same on all ranks.
        describe: gives what to add to the last words of this process.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], session: str) -> None:
        self.session = session
        self.describe: Callable[[], str] = str
        self._rank = rank
        self._peers = dict(peers)
        self._lock = threading.Lock()
        self._failure = ""
        self._failed = threading.Event()
        self._failed_at = -math.inf
        self._left = False
        self._thread = threading.Thread(target=self._listen, name="ikem_fast watch", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, rank: int, size: int, store: Store, address: str) -> Watch:
        """Connects the ranks. All of them must call it.

        Args:
            rank: of this process.
            size: number of processes.
            store: that all ranks share. It may still hold what an attempt before this one left in it.
            address: of the machine that rank 0 runs on.

        Raises:
            OSError: rank 0 cannot be reached, or a rank does not come.
        """
        until = time.monotonic() + _CONNECT_SECONDS
        return cls(rank, *(_accept(size, store, until) if rank == 0 else _connect(rank, size, store, address, until)))

    def report(self, reason: str) -> None:
        """Tells the others that this process ends, and why."""
        how = f"failed: {reason}"
        self._tell({"rank": self._rank, "ended": how})
        self._take_down(f"rank {self._rank} {how}")

    def failure(self, seconds: float) -> str | None:
        """Of the first rank that ended before its time, which and how; waits for such news for some seconds."""
        return self._failure if self._failed.wait(seconds) else None

    def failed_since(self) -> float:
        """Seconds since the first such news; infinity without any."""
        return time.monotonic() - self._failed_at

    def close(self) -> None:
        """Takes leave of the others, for whom the end of this process is no news then."""
        self._left = True
        self._tell({"rank": self._rank, "left": True})
        for connection in self._peers.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _tell(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            for connection in self._peers.values():
                with suppress(OSError):
                    _send(connection, message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, (rank, bytearray()))
            while not self._left and (selector.get_map() or self._failed.is_set()):
                for key, _ in selector.select(0.2 if self._failed.is_set() else 1.0):
                    if self._hear(key.fileobj, *key.data):
                        selector.unregister(key.fileobj)
                if self._failed.is_set() and self.failed_since() > _GRACE_SECONDS and not self._left:
                    self._end_process()

    def _hear(self, connection: socket.socket, rank: int, unread: bytearray) -> bool:
        """Takes in what came from a rank; true if nothing more will."""
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._note(rank, "ended without a word, as if killed")
            return True
        unread += received
        *lines, rest = bytes(unread).split(b"\n")
        unread[:] = rest
        for line in lines:
            message = json.loads(line)
            if "left" in message:
                return True
            self._note(message["rank"], message["ended"])
        return False

    def _note(self, rank: int, how: str) -> None:
        if self._failed.is_set() or self._left:
            return
        if self._rank == 0:
            self._tell({"rank": rank, "ended": how})
        self._take_down(f"rank {rank} {how}")

    def _take_down(self, failure: str) -> None:
        if not self._failed.is_set():
            self._failure, self._failed_at = failure, time.monotonic()
            self._failed.set()

    def _end_process(self) -> None:
        print(f"error (rank {self._rank}): {self._failure}{self.describe()}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)


def _accept(size: int, store: Store, until: float) -> tuple[dict[int, socket.socket], str]:
    """Rank 0: connections with all others, and the session."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    peers: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both) as server:
        session = secrets.token_hex(16)
        store.set(_STORE_KEY, f"{server.getsockname()[1]} {session}")
        while len(peers) < size - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            connection, _ = server.accept()
            connection.settimeout(_GREETING_SECONDS)
            with suppress(OSError, ValueError, KeyError, TypeError):
                greeting = json.loads(_read_line(connection))
                if greeting["size"] == size and secrets.compare_digest(greeting["session"], session):
                    peers[greeting["rank"]] = connection
                    continue
            connection.close()  # somebody else, or of another attempt
    for connection in peers.values():
        _send(connection, {"session": session})
        connection.settimeout(None)
    return peers, session


def _connect(rank: int, size: int, store: Store, address: str, until: float) -> tuple[dict[int, socket.socket], str]:
    """Other ranks: the connection with rank 0, and the session."""
    while True:
        # At first this may be where rank 0 of an attempt before was: it does not answer, or is another by now.
        port, session = store.get(_STORE_KEY).decode().split()
        try:
            connection = socket.create_connection((address, int(port)), _GREETING_SECONDS)
            with ExitStack() as otherwise_closed:
                otherwise_closed.enter_context(connection)
                _send(connection, {"rank": rank, "size": size, "session": session})
                connection.settimeout(max(until - time.monotonic(), 0.001))
                if json.loads(_read_line(connection)) == {"session": session}:
                    connection.settimeout(None)
                    otherwise_closed.pop_all()
                    return {0: connection}, session
        except (OSError, ValueError) as error:
            if time.monotonic() > until:
                raise OSError(f"rank 0 does not answer at {address}:{port}: {error}") from error
        time.sleep(0.1)


def _read_line(connection: socket.socket) -> bytes:
    """The first line, and nothing of what follows it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000:
        line += connection.recv(1) or b"\n"
    return line


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
