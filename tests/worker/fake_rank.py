"""A rank process without torch: obeys the step and KV channels, and misbehaves on request.

What it does is chosen by `StartRank.model_dir`: `echo` answers every plan, `refuse` reports a model error, `die` exits
before it is ready, `hang` never becomes ready, `stop` stops itself once it is ready (SIGSTOP), `fail-step` reports a
failure at the first plan, `abort` ends at the first plan as a library does that finds its own state wrong.
"""

import os
import signal
import socket
import sys
import threading

import msgspec

from common.worker.framing import BlockingFrames
from common.worker.rank_messages import (
    ConnectDone,
    ConnectPeer,
    FrontKVMessage,
    FrontStepMessage,
    RankFailed,
    RankReady,
    StartRank,
)
from common.worker.step_plan import SampledToken, StepPlan, StepResult


def main() -> None:
    steps, kv = (BlockingFrames(socket.socket(fileno=int(fd))) for fd in sys.argv[1:])
    start = _next_step(steps)
    assert isinstance(start, StartRank)
    if start.model_dir == "die":
        os._exit(3)
    if start.model_dir == "hang":
        steps.receive()
        return
    if start.model_dir == "refuse":
        steps.send(RankFailed(start.rank, "ModelError", "tensor lm_head.weight is missing"))
        return
    threading.Thread(target=_serve_kv, args=(kv,), daemon=True).start()
    steps.send(RankReady(start.rank, f"fake://{start.rank}", "fingerprint", 7, 8))
    if start.model_dir == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while (message := _next_step(steps)) is not None:
        if not isinstance(message, StepPlan):
            continue
        if start.model_dir == "abort":
            sys.stderr.write("address.c:1138 Assertion `version == 2' failed\n==== backtrace ====\n 0 libucs.so\n===\n")
            sys.stderr.flush()
            os.abort()
        if start.model_dir == "fail-step":
            steps.send(RankFailed(start.rank, "RuntimeError", "boom"))
            return
        if start.model_dir == "babble":
            while True:
                steps.send(StepResult(message.step_id, [], 1))
        if start.rank == 0:
            sampled = [SampledToken(segment.row, segment.position) for segment in message.segments]
            steps.send(StepResult(message.step_id, sampled, 1))


def _serve_kv(kv: BlockingFrames) -> None:
    decoder: msgspec.msgpack.Decoder[FrontKVMessage] = msgspec.msgpack.Decoder(FrontKVMessage)
    while (frame := kv.receive()) is not None:
        message = decoder.decode(frame)
        if isinstance(message, ConnectPeer):
            kv.send(ConnectDone(message.op_id, "first"))
            kv.send(ConnectDone(message.op_id, "second"))


def _next_step(steps: BlockingFrames) -> FrontStepMessage | None:
    frame = steps.receive()
    decoder: msgspec.msgpack.Decoder[FrontStepMessage] = msgspec.msgpack.Decoder(FrontStepMessage)
    return None if frame is None else decoder.decode(frame)


if __name__ == "__main__":
    main()
