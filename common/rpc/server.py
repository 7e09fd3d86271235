"""A gRPC server with health and reflection: where it listens, how it ends, and that nobody misses its end.

What happens to a call is `common.rpc.calls`' business. Knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import FailedPrecondition, InternalError
from common.rpc.calls import Calls
from common.rpc.client import KEEPALIVE_OPTIONS
from common.rpc.connections import close_connections, close_listeners
from common.rpc.grpc_server import make_server
from common.rpc.health import HealthServicer

_Servicer = TypeVar("_Servicer")

MIN_PING_INTERVAL_MS = 1_000
END_GRACE_S = 1.0  # for calls that are cancelled, to send their status
AGE_JITTER = 1.15  # gRPC adds up to a tenth to a connection's age
QUIET_S = 1.0  # without a call: then nobody is about to send the next
PAUSE_PER_LOOK = 10.0  # the time that looking at all connections took
LOOK_EVERY_S = 0.5  # whether gRPC's loop has ended, which nothing tells


class RpcServer:
    """A gRPC server on one address. Health says NOT_SERVING until `set_serving(True)`.

    Of callers it takes messages of up to `max_request_bytes`, by default as large as it sends itself. Clients are asked
    to connect anew after `max_connection_age_s`; what runs on the old connection goes on.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        max_request_bytes: int | None = None,
        so_reuseport: bool = False,
        max_connection_age_s: float | None = None,
    ) -> None:
        self._address = address
        self._port = 0
        self._health = HealthServicer()
        self._calls = Calls()
        self._max_connection_age_s = max_connection_age_s
        age_ms = (
            [] if max_connection_age_s is None else [("grpc.max_connection_age_ms", round(1e3 * max_connection_age_s))]
        )
        self._server = make_server(
            interceptors=[self._calls],
            options=[
                *age_ms,
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_request_bytes or max_message_bytes),
                ("grpc.so_reuseport", int(so_reuseport)),
                # A client that is gone without a word, or frozen, must not keep what it holds until its deadline.
                *KEEPALIVE_OPTIONS,
                # Clients ping idle connections (common.rpc.client); that is no abuse.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self,
        add_fn: Callable[[_Servicer, grpc.aio.Server], None],
        servicer: _Servicer,
        service_full_name: str,
    ) -> None:
        """Add a service before `start`: `add(add_DecodeServicer_to_server, servicer, "baton.v1.Decode")`."""
        add_fn(servicer, self._server)
        self._health.names.add(service_full_name)

    async def start(self) -> int:
        """Bind and serve. Returns the port (the kernel's choice if the address ends in `:0`)."""
        names = filter(None, self._health.names)
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self._server,
        )
        try:
            self._port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise FailedPrecondition(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        return self._port

    async def run(self) -> None:
        """Watch over the server that has been started, until `stop`. Raises `InternalError` if it ends by itself:
        its port is closed then, and only another process can take its place."""
        try:
            while await self._server.wait_for_termination(LOOK_EVERY_S):
                pass
        except Exception as error:
            raise InternalError(f"the server on port {self._port} has ended: {error!r}") from error

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers from now on, for every service and for the server as a whole."""
        self._health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Take no connection and no call any more, give those under way `grace_s` seconds, then end them.

        Whoever is not served is told UNAVAILABLE, or loses his connection, which is the same to him. Where connections
        have an age, calls on those that are in use are taken until each has been asked to go elsewhere, for half of
        `grace_s` at most: clients that can go elsewhere lose nothing. May be cancelled, and called again.
        """
        self._health.end()
        if self._port:
            if grace_s > 0:
                close_listeners(self._port)
            try:
                async with asyncio.timeout(grace_s):
                    await self._last_calls(grace_s / 2)
            except TimeoutError:
                self._calls.refuse()
                await self._calls.end(END_GRACE_S)
            # gRPC answers CANCELLED to calls that come while it shuts down: from here on it talks to nobody.
            close_connections(self._port)
        await self._server.stop(None)
        self._port = 0  # it may be somebody else's from here on

    async def _last_calls(self, longest_s: float) -> None:
        """Until none is under way."""
        leaving_s = 0.0 if self._max_connection_age_s is None else self._max_connection_age_s * AGE_JITTER
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(leaving_s, longest_s)):
                while (idle_s := self._calls.idle_s()) < QUIET_S:
                    with contextlib.suppress(TimeoutError):
                        # Longer, if a call runs: who sends one after the other is between two of them now and then.
                        async with asyncio.timeout(None if self._calls.num_running else QUIET_S - idle_s):
                            await self._calls.one_is_over()
        self._calls.refuse()
        loop = asyncio.get_running_loop()
        while self._calls.num_running:
            began_s = loop.time()
            close_connections(self._port, except_ports=self._calls.peer_ports())
            pause_s = PAUSE_PER_LOOK * (loop.time() - began_s)
            await self._calls.one_is_over()
            if self._calls.num_running:
                # Looking at all connections for each call that ends would hold up those that have not.
                await asyncio.sleep(pause_s)
