"""A loopback HTTP proxy before an object store that fails the way stores and networks do.

Which requests fail, and how, follows from a seed and the number of the request. Stores demand
retries for all of it:

- slowdown: 503 SlowDown, the request never reaches the store;
- reset: the connection is reset before the request reaches the store;
- lost_answer: the store does what was asked, but the answer never arrives;
- truncated: the answer breaks off in the middle of its body;
- slow: the answer comes late.
"""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("slowdown", "reset", "lost_answer", "truncated", "slow")
SLOWDOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "expect", "content-length"}


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `127.0.0.1:target`; a share `rate` of the requests meets a fault."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        target: int,
        *,
        rate: float = 0.15,
        seed: int = 0,
        faults: Sequence[str] = FAULTS,
        delay: float = 0.5,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.rate, self.faults, self.delay = target, rate, tuple(faults), delay
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.sent = 0  # bytes of answers

    @property
    def port(self) -> int:
        return self.server_address[1]

    def next_fault(self) -> str:
        """What happens to this request: a fault, or "ok"."""
        with self.lock:
            hit = self.random.random() < self.rate
            fault = self.random.choice(self.faults) if hit else "ok"
            self.counts[fault] += 1
        return fault

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the game."""


@contextmanager
def faulty_proxy(target: int, **options) -> Iterator[FaultyProxy]:
    """A running proxy."""
    server = FaultyProxy(target, **options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline:
            self.close_connection = True
        elif self.parse_request():
            self._answer()

    def _answer(self) -> None:
        fault = self.server.next_fault()
        body = self._read_body()
        if fault == "reset":
            return self._reset()
        if fault == "slowdown":
            return self._send(503, [("Content-Type", "application/xml")], SLOWDOWN)
        if fault == "slow":
            time.sleep(self.server.delay)
        status, headers, content = self._forward(body)
        if fault == "lost_answer":
            return self._reset()
        if fault == "truncated" and content:
            self._send(status, headers, content, cut=len(content) // 2)
            return self._reset()
        return self._send(status, headers, content)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=120)
        try:
            # The signature covers the Host header, so that stays what the client sent.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_HEADERS:
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            content = answer.read()
            headers = answer.getheaders()
        finally:
            upstream.close()
        if self.command == "HEAD":
            length = [(name, value) for name, value in headers if name.lower() == "content-length"]
            kept = [pair for pair in headers if pair[0].lower() not in HOP_HEADERS]
            return answer.status, kept + length, b""
        return (
            answer.status,
            [pair for pair in headers if pair[0].lower() not in HOP_HEADERS],
            content,
        )

    def _send(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        cut: int | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with self.server.lock:
                self.server.sent += len(content[:cut])
            self.wfile.write(content[:cut])
        self.wfile.flush()

    def _reset(self) -> None:
        """Closes with RST instead of FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
