"""A peer in a process of its own, to be killed: `python -m tests.transport.sending_peer ADDRESS NUM_BYTES`.

Tag 2 is posted. Sends one message under tag 1 when a line arrives on its standard input, then waits to be killed.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from common.transport.registry import open_endpoint


async def main() -> None:
    endpoint = await open_endpoint("ucx://127.0.0.1:0", "child")
    connection = await endpoint.connect(sys.argv[1], 20.0)
    num_bytes = int(sys.argv[2])
    posted = connection.post_receive(2, torch.zeros(num_bytes, dtype=torch.uint8))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await connection.send(1, torch.ones(num_bytes, dtype=torch.uint8))
    await posted.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main())
