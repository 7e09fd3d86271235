"""`python -m services.decode`: one decode worker."""

from __future__ import annotations

import asyncio
import sys

from baton.v1 import decode_pb2_grpc

from common.worker.worker_process import run_worker, serve_worker
from services.decode.config import DecodeConfig
from services.decode.server import SERVICE_NAME, DecodeService
from services.decode.worker import DecodeWorker


async def serve(config: DecodeConfig) -> None:
    """The worker's life. Raises what the ranks could not be started for."""
    model = config.read_model()
    changed = asyncio.Event()
    worker = DecodeWorker(config, model, changed.set)
    service = DecodeService(worker)
    await serve_worker(worker, changed, decode_pb2_grpc.add_DecodeServicer_to_server, service, SERVICE_NAME)


if __name__ == "__main__":
    sys.exit(run_worker(DecodeConfig, serve))
