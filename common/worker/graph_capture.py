"""Steps captured into CUDA graphs; where there are none (a CPU that interprets the kernels) they are called instead.

All graphs of a runner are captured on one stream, whose workspaces they share, and take their memory from one pool:
they run one after the other, so what one keeps only while it runs may lie where another does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import torch

_WARM_UPS: Final = 2  # compile kernels and let libraries allocate, before anything is captured
_Output = TypeVar("_Output")


class GraphCapture:
    """Captures for one device."""

    def __init__(self, device: torch.device) -> None:
        captures = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if captures else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if captures else None

    def capture(self, run: Callable[[], _Output]) -> Callable[[], _Output]:
        """What replays `run` on the current stream and returns what it returned, with new contents.

        Of several captures the largest should come first: the others fit into the memory that it took.
        """
        stream = self._stream
        if stream is None:
            return run
        # Warm up on the stream that captures, so that what kernels keep for themselves exists already.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        torch.cuda.current_stream(stream.device).wait_stream(stream)

        def replay() -> _Output:
            graph.replay()
            return output

        return replay
