"""A proxy before an S3 server that spoils requests, by a plan: what a network and an overloaded server do."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["500", "503", "slow down", "lost request", "lost answer", "half a request", "half an answer", "stall"]
FAULTS: tuple[Fault, ...] = (
    "500", "503", "slow down", "lost request", "lost answer", "half a request", "half an answer", "stall",
)  # fmt: skip
Plan = Callable[[str], Fault | None]  # of a request, as `PUT /bucket/key?query`
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


def seeded(seed: int, share: float, faults: tuple[Fault, ...] = FAULTS) -> Plan:
    """A fault for this share of the requests."""
    draws = random.Random(seed)
    lock = threading.Lock()

    def plan(_: str) -> Fault | None:
        with lock:
            return draws.choice(faults) if draws.random() < share else None

    return plan


class Proxy(ThreadingHTTPServer):
    """Hands requests on to `target`, or spoils them."""

    daemon_threads = True

    def __init__(self, target: str, plan: Plan, stall_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.plan, self.stall_seconds = urlsplit(target), plan, stall_seconds
        self.spoiled: list[Fault] = []
        self.requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Broken connections are what it is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def hand_on(self) -> None:
        fault = self.server.plan(f"{self.command} {self.path}")
        self.server.requests += 1
        if fault is not None:
            self.server.spoiled.append(fault)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "lost request":
            return self.reset()
        if fault == "half a request":
            self.rfile.read(length // 2)
            return self.reset()
        body = self.rfile.read(length)
        if fault == "stall":
            time.sleep(self.server.stall_seconds)
            return self.reset()
        if fault in ("500", "503", "slow down"):
            content = SLOW_DOWN if fault == "slow down" else b""
            return self.reply(503 if fault == "slow down" else int(fault), {}, content)
        upstream = HTTPConnection(str(self.server.target.hostname), self.server.target.port, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        if fault == "lost answer":
            return self.reset()
        half = len(content) // 2 if fault == "half an answer" else None
        self.reply(answer.status, dict(answer.getheaders()), content, half)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = hand_on  # noqa: N815

    def reply(self, status: int, headers: dict[str, str], content: bytes, half: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        told = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", told or str(len(content)))
        self.end_headers()
        self.wfile.write(content[:half])
        if half is not None:
            self.wfile.flush()
            self.reset()

    def reset(self) -> None:
        """End the connection as a crash does: the other side is told nothing but a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def flaky(target: str, plan: Plan, stall_seconds: float) -> Iterator[Proxy]:
    proxy = Proxy(target, plan, stall_seconds)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
