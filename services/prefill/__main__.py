"""`python -m services.prefill`: one prefill worker."""

from __future__ import annotations

import asyncio
import sys

from baton.v1 import prefill_pb2_grpc

from common.worker.worker_process import run_worker, serve_worker
from services.prefill.config import PrefillConfig
from services.prefill.decode_peers import DecodePeers
from services.prefill.server import SERVICE_NAME, PrefillService
from services.prefill.worker import PrefillWorker


async def serve(config: PrefillConfig) -> None:
    """The worker's life. Raises what the ranks could not be started for."""
    model = config.read_model()
    changed = asyncio.Event()
    worker = PrefillWorker(config, model, changed.set)
    peers = DecodePeers(config.max_message_bytes, config.max_idle_channels)
    service = PrefillService(worker, peers)
    try:
        await serve_worker(worker, changed, prefill_pb2_grpc.add_PrefillServicer_to_server, service, SERVICE_NAME)
    finally:
        await peers.close()


if __name__ == "__main__":
    sys.exit(run_worker(PrefillConfig, serve))
