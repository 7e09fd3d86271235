"""Serves a service's metrics to Prometheus over HTTP, on the loop that changes them: no thread, no lock.

One request a connection, few connections, little time for each: whoever connects and says nothing makes room for the
next. A scrape takes the loop a few milliseconds. Knows no service.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from prometheus_client.exposition import choose_encoder

from common.errors import FailedPrecondition
from common.telemetry.metrics import Metrics

MAX_CONNECTIONS = 32
REQUEST_TIMEOUT_S = 5.0  # from the connection to the last byte of the answer
MAX_HEAD_BYTES = 16 << 10
_PATHS = ("/", "/metrics")


class MetricsServer:
    """`/metrics` on one address, from `start` to `stop`."""

    def __init__(self, metrics: Metrics, port: int, host: str = "127.0.0.1") -> None:
        self._metrics = metrics
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # oldest first

    @property
    def port(self) -> int:
        """The port in use (the kernel's choice if 0 was asked for)."""
        return self._port

    async def start(self) -> None:
        """Listen. Raises `FailedPrecondition` if it cannot."""
        try:
            self._server = await asyncio.start_server(self._take, self._host, self._port, limit=MAX_HEAD_BYTES)
        except OSError as error:
            raise FailedPrecondition(f"cannot serve metrics on {self._host}:{self._port}: {error}") from error
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection. No effect if it was not started."""
        if self._server is None:
            return
        self._server.close()
        connections = set(self._connections)
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            next(iter(self._connections)).cancel()
        task = asyncio.create_task(self._serve(reader, writer))  # `stop` is its parent
        self._connections[task] = writer
        task.add_done_callback(self._is_over)

    def _is_over(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).transport.abort()
        if not task.cancelled():
            task.result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head.decode("latin-1")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # whoever asks so gets no answer

    def _answer(self, head: str) -> bytes:
        request, *fields = head.split("\r\n")
        method, _, rest = request.partition(" ")
        if method != "GET":
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET only\n")
        if rest.partition(" ")[0].partition("?")[0] not in _PATHS:
            return _response(HTTPStatus.NOT_FOUND, "text/plain", b"see /metrics\n")
        accepted = [value.strip() for name, _, value in map(_split, fields) if name.lower() == "accept"]
        encode, content_type = choose_encoder(",".join(accepted))
        return _response(HTTPStatus.OK, content_type, encode(self._metrics.registry))


def _split(field: str) -> tuple[str, str, str]:
    return field.partition(":")


def _response(status: HTTPStatus, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
