"""What the host does with a prompt's token ids before and behind a prefill, stage by stage, in microseconds.

    python -m benchmarks.token_path [--tokens 2048 8192]

One request at a time goes through the functions that a deployment calls, with real messages and no sockets: what is
timed is processor time that no network or device can hide. The stages of the prefill path follow one another and are
time to first token; decode's run beside them. The rank's part ends with the arrays that a step uploads.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from baton.v1 import decode_pb2, inference_pb2, kv_pb2, prefill_pb2

from benchmarks.goodput import SHIPPED
from common.kernels.batch import KVShape, Span
from common.kernels.cuda_backend import plan_batch
from common.kernels.upload import upload
from common.kvcache.kv_cache_manager import KVCacheManager
from common.worker.device_runner import step_arrays
from common.worker.framing import encode_frame
from common.worker.rank_messages import FrontStepMessage
from common.worker.row_table import RowLimits, RowTable
from common.worker.sequence import SequenceLimits, SequenceRequest
from common.worker.step_plan import AddRow, SampledToken, StepPlan, StepResult, unpack_tokens
from services.decode.block_ledger import BlockLedger
from services.prefill.admission import SchedulerLimits
from services.prefill.scheduler import Scheduler
from services.router.attempt import RequestPlan, SequenceToSend
from services.router.choice import Choice, ChoiceLimits
from services.router.metrics import RouterMetrics
from services.router.request_record import RequestRecord
from services.router.tokenizer import Tokenizer
from services.router.validation import ModelLimits, resolve_sampling, validate

BLOCK_SIZE = 64
NUM_BLOCKS = 512  # so few that every prompt evicts another, as in a worker that has run for a while
VOCAB_SIZE = 128_256
CONTEXT_LENGTH = 131_072
MAX_STEP_TOKENS = 8192  # the longest prompt in one step: what is left is handling, not steps
MAX_MESSAGE_BYTES = 16 << 20
MODEL = b"model"
NUM_WARM_UPS = 20
CPU = torch.device("cpu")
SHAPE = KVShape(NUM_BLOCKS, 8, BLOCK_SIZE, 128)
_decoder: msgspec.msgpack.Decoder[FrontStepMessage] = msgspec.msgpack.Decoder(FrontStepMessage)


class Stopwatch:
    """Microseconds between one `lap` and the next, by name, one value for each request."""

    def __init__(self) -> None:
        self.laps_us: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        self._last_ns = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        now_ns = time.perf_counter_ns()
        self.laps_us.setdefault(name, []).append((now_ns - self._last_ns) / 1e3)
        self._last_ns = time.perf_counter_ns()


def route(watch: Stopwatch, body: bytes, number: int, choice: Choice) -> tuple[bytes, bytes]:
    """The router: a client's message in, its messages to prefill and decode out."""
    limits = ModelLimits("m", CONTEXT_LENGTH, VOCAB_SIZE, (2,), False, MAX_MESSAGE_BYTES)
    record = RequestRecord(RouterMetrics(), time.monotonic_ns())
    watch.start()
    message = inference_pb2.GenerateRequest.FromString(body)
    watch.lap("router: parse")
    request = validate(message, limits)
    watch.lap("router: validate")
    assert request.token_ids is not None
    sampling = resolve_sampling(request, len(request.token_ids), limits)
    routed = RequestPlan("r", request.token_ids, sampling, "", (2,), time.monotonic() + 60.0, record)
    watch.lap("router: sampling, plan")
    sequence = SequenceToSend(routed, choice, number, timeout_ns=60 * 10**9)
    to_prefill = prefill_pb2.PrefillRequest(ticket=kv_pb2.Ticket(ticket_id=number))
    sequence.write_to(to_prefill.sequence)
    opening = decode_pb2.SessionRequest()
    opening.open.ticket_id = number
    sequence.write_to(opening.open.sequence)
    watch.lap("router: build Prefill and Open")
    prefill_body = to_prefill.SerializeToString()
    watch.lap("router: serialize Prefill")
    open_body = opening.SerializeToString()
    watch.lap("router: serialize Open (behind Prefill)")
    return prefill_body, open_body


def plan(watch: Stopwatch, scheduler: Scheduler, body: bytes) -> list[bytes]:
    """The prefill front up to the frames that go to the rank."""
    limits = SequenceLimits(VOCAB_SIZE, CONTEXT_LENGTH)
    watch.start()
    message = prefill_pb2.PrefillRequest.FromString(body)
    watch.lap("prefill: parse")
    request = SequenceRequest.from_proto(message.sequence, time.monotonic(), limits)
    watch.lap("prefill: take the sequence")
    scheduler.add(request)
    watch.lap("prefill: block hashes and queue")
    assert scheduler.plan()
    messages = scheduler.take_messages()
    watch.lap("prefill: admit and plan")
    frames = [encode_frame(each) for each in messages]
    watch.lap("prefill: encode for the rank")
    return frames


def launch(watch: Stopwatch, frames: Sequence[bytes]) -> tuple[StepPlan, list[int]]:
    """The rank, from frames to the arrays of the step. Returns the token ids that it would compute as well."""
    rows = RowTable(8, RowLimits(CONTEXT_LENGTH, VOCAB_SIZE, NUM_BLOCKS, BLOCK_SIZE))
    watch.start()
    messages = [_decoder.decode(frame[4:]) for frame in frames]
    watch.lap("rank: decode the frames")
    add_row, step = messages
    assert isinstance(add_row, AddRow)
    assert isinstance(step, StepPlan)
    rows.add(add_row.row, has_last_token=False)
    segments, errors = rows.check(step)
    assert segments
    assert not errors
    watch.lap("rank: check the plan")
    for segment in segments:
        rows[segment.row].block_ids.extend(segment.new_block_ids)
    spans = [Span(s.num_tokens, s.position + s.num_tokens, rows[s.row].block_ids) for s in segments]
    plan_batch(spans, (None,), SHAPE, torch.bfloat16, CPU)
    watch.lap("rank: attention's tables")
    token_ids = upload(step_arrays(segments), CPU)[0]
    watch.lap("rank: token ids and positions")
    return step, token_ids.tolist()


def finish(watch: Stopwatch, scheduler: Scheduler, step: StepPlan) -> None:
    """The prefill front when the step's result is back, up to the event of the first token."""
    result = StepResult(step.step_id, [SampledToken(segment.row, 5) for segment in step.segments], 1)
    watch.start()
    scheduler.complete(result)
    events = scheduler.take_events()
    watch.lap("prefill: commit blocks, first token")
    for event in events:
        scheduler.release(event.prompt)
    scheduler.take_messages()


def open_at_decode(watch: Stopwatch, ledger: BlockLedger, body: bytes) -> list[int]:
    """Decode's front and its rank's first message, beside the prefill. Returns the prompt as the rank has it."""
    limits = SequenceLimits(VOCAB_SIZE, CONTEXT_LENGTH)
    watch.start()
    message = decode_pb2.SessionRequest.FromString(body)
    watch.lap("decode: parse")
    request = SequenceRequest.from_proto(message.open.sequence, time.monotonic(), limits)
    watch.lap("decode: take the sequence")
    blocks, _ = ledger.admit(request)
    watch.lap("decode: block hashes")
    frame = encode_frame(request.add_row(0))
    watch.lap("decode: row for the rank")
    row = _decoder.decode(frame[4:])
    watch.lap("decode rank: decode the row")
    assert blocks.num_cached_blocks == 0
    assert isinstance(row, AddRow)
    return unpack_tokens(row.prompt_token_ids).tolist()


def measure(num_tokens: int, num_requests: int) -> dict[str, float]:
    """Medians, microseconds. Every prompt is new, so nothing is found in a prefix cache."""
    limits = ChoiceLimits(8, frozenset({2}), (), False, True)
    choice = Choice(0, limits, Tokenizer.from_directory(SHIPPED), lambda choice: None)  # nothing generated yet
    watch, generator = Stopwatch(), np.random.default_rng(1)
    scheduler = Scheduler(KVCacheManager(NUM_BLOCKS, BLOCK_SIZE), SchedulerLimits(8, MAX_STEP_TOKENS, 8), MODEL)
    ledger = BlockLedger(lambda: KVCacheManager(NUM_BLOCKS, BLOCK_SIZE), MODEL)
    for number in range(1, num_requests + NUM_WARM_UPS + 1):
        message = inference_pb2.GenerateRequest()
        prompt = generator.integers(0, VOCAB_SIZE, num_tokens).tolist()
        message.token_ids.ids.extend(prompt)
        message.sampling.max_tokens = 8
        prefill_body, open_body = route(watch, message.SerializeToString(), number, choice)
        frames = plan(watch, scheduler, prefill_body)
        step, computed = launch(watch, frames)
        finish(watch, scheduler, step)
        opened = open_at_decode(watch, ledger, open_body)
        assert computed == opened == prompt, "the ranks have another prompt than the client sent"
    scheduler.check_integrity()
    return {name: statistics.median(laps[NUM_WARM_UPS:]) for name, laps in watch.laps_us.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    if not 1 <= max(args.tokens) <= MAX_STEP_TOKENS:
        parser.error(f"--tokens: 1 to {MAX_STEP_TOKENS}")
    torch.set_num_threads(1)
    found = [measure(num_tokens, args.requests) for num_tokens in args.tokens]
    print(f"µs, medians of {args.requests} | " + " | ".join(f"{tokens} tokens" for tokens in args.tokens))
    for name in found[0]:
        print(f"{name} | " + " | ".join(f"{own[name]:.0f}" for own in found))
    totals = [
        math.fsum(us for name, us in own.items() if not name.startswith("decode") and "behind" not in name)
        for own in found
    ]
    print("before the first token, all of it | " + " | ".join(f"{total:.0f}" for total in totals))
    if len(totals) > 1:
        growth = (totals[-1] - totals[0]) / (args.tokens[-1] - args.tokens[0]) * 1000
        print(f"growth: {growth:.0f} µs for each 1,000 tokens")


if __name__ == "__main__":
    main()
