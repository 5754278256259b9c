"""A recipe on several nodes: node 0 decides which stages run, and the others start their ranks of each stage.

`ramoe run` is started once on every node. Node 0 listens on MASTER_PORT + 1. The other nodes connect and
receive each stage's command. A closed connection ends them, so that nothing waits for a lost node. All nodes
see the run folder under the same path.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ramoe_megatron.errors import RamoeError
from ramoe_megatron.recipe.launcher import Place, launch, python_command, rank_environment
from ramoe_megatron.recipe.output import relevant_lines
from ramoe_megatron.recipe.stage import Stage

CONNECT_SECONDS = 600.0  # the nodes of an allocation may start minutes apart


class Leader:
    """The side of node 0. With one node it does nothing.

    Raises RamoeError when the port is taken, or when not every node has connected in time.
    """

    def __init__(self, place: Place, patience: float = CONNECT_SECONDS) -> None:
        self.place, self.patience = place, patience
        self._followers: list[socket.socket] = []

    def __enter__(self) -> Self:
        if self.place.nodes == 1:
            return self
        self.place.refuse_taken(0)
        with self._listening() as server:
            deadline = time.monotonic() + self.patience
            while len(self._followers) < self.place.nodes - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    follower, _ = server.accept()
                except TimeoutError:
                    self._close()
                    raise RamoeError(
                        f"{len(self._followers) + 1} of {self.place.nodes} nodes came within "
                        f"{self.patience:.0f} s: start the same command on every node, "
                        f"and make sure that port {self.place.port + 1} of {self.place.address} can be "
                        "reached"
                    ) from None
                self._followers.append(follower)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._send(b"null\n")
        self._close()

    def _listening(self) -> socket.socket:
        try:
            return socket.create_server(("", self.place.port + 1), reuse_port=False)
        except (OSError, OverflowError) as error:
            raise self.place.taken(self.place.port + 1, error) from error

    def announce(self, stage: Stage) -> None:
        """Tell the other nodes to start their ranks of a stage. A stage without ranks runs on node 0 only."""
        if stage.ranks == 0:
            return
        order = {"arguments": stage.arguments(), "ranks": stage.ranks, "log": str(stage.log)}
        self._send(json.dumps(order).encode() + b"\n")

    def watch(self) -> None:
        """Raise RamoeError when another node is lost, so that node 0 does not wait for its ranks."""
        for follower in self._followers:
            _look(follower, "another node")

    def _send(self, line: bytes) -> None:
        for follower in self._followers:
            try:
                follower.sendall(line)
            except OSError as error:
                raise RamoeError(f"another node has ended ({error.strerror}): see its output") from error

    def _close(self) -> None:
        for follower in self._followers:
            follower.close()


def follow(place: Place, folder: Path, patience: float = CONNECT_SECONDS) -> int:
    """The side of the other nodes: run what node 0 asks until it closes the connection.

    Logs go to logs/STAGE.node-K.log. Returns 0, or 75 when a training stopped early and has to be resumed.
    Raises RamoeError when a stage fails on this node, or node 0 is lost.
    """
    with _connected(place, patience) as link:
        for order in _orders(link, place):
            log = folder / order["log"]
            environment = rank_environment(order["ranks"], os.environ)
            command = python_command(order["arguments"], order["ranks"], place)
            own_log = log.with_suffix(f".node-{place.node}.log")
            outcome = launch(command, environment, own_log, while_running=lambda: _look(link, "node 0"))
            if outcome.unfinished:
                # If this node's ranks end first, node 0 would take the closed connection for a lost node.
                _await_end(link)
                return outcome.status
            if outcome.status:
                text, _ = relevant_lines(outcome.last_lines)
                raise RamoeError(
                    "\n  ".join([f"{log.stem} failed on node {place.node}:", *text, f"log: {own_log}"])
                )
    return 0


def _await_end(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while link.recv(4096):
            pass


@contextlib.contextmanager
def _connected(place: Place, patience: float) -> Iterator[socket.socket]:
    deadline = time.monotonic() + patience
    while True:
        try:
            link = socket.create_connection((place.address, place.port + 1), timeout=10)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RamoeError(
                    f"node 0 ({place.address}, port {place.port + 1}) does not answer ({error}): "
                    "start the same command there"
                ) from error
            time.sleep(0.2)
    with link:
        link.settimeout(None)
        yield link


def _orders(link: socket.socket, place: Place) -> Iterator[dict[str, Any]]:
    with link.makefile("rb", buffering=0) as lines, contextlib.suppress(ConnectionResetError):
        while line := lines.readline():
            try:
                order = json.loads(line)
            except ValueError as error:
                raise place.taken(place.port + 1, RamoeError("another program answers there")) from error
            if order is None:
                return
            yield order
    raise RamoeError("node 0 has ended: see its output")


def _look(link: socket.socket, other: str) -> None:
    try:
        gone = link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return
    except ConnectionResetError:
        gone = True
    if gone:
        raise RamoeError(f"{other} has ended: see its output")
