"""The spans and log lines of each service by itself, in the cases that a quiet deployment does not have."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import grpc
import pytest
from baton.v1 import decode_pb2, inference_pb2, kv_pb2

from common.errors import DeadlineExceeded
from tests.decode.front import Prefill, Router, running_front, ship
from tests.prefill.harness import running
from tests.router.cluster import running_cluster
from tests.router.fake_workers import letters
from tests.telemetry.spans import MemoryTracing, attribute, end_ns, is_child, start_ns, traced_caller


def logged(caplog: pytest.LogCaptureFixture, service: str) -> list[dict[str, object]]:
    """What the lines of the request log say."""
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == f"baton.{service}.request"]


def text_request(num_tokens: int) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text="hello", request_id="a request")
    request.sampling.max_tokens = num_tokens
    return request


async def test_a_sequence_that_moves_is_placed_and_opened_again_within_one_trace(tmp_path: Path) -> None:
    tracing = MemoryTracing()
    async with running_cluster(tmp_path, num_decodes=2, tracing=tracing) as cluster:
        cluster.script.at_position[4] = decode_pb2.SEQUENCE_END_LOST
        assert (await cluster.generate(text_request(9)))[0].token_ids == letters(0, 9)
    (request,) = tracing.named("request")
    names = [span.name for span in tracing.spans]
    assert sorted(names) == sorted(["request", "admit", "tokenize", "place", "open", "place", "open"])
    assert all(is_child(span, request) for span in tracing.spans if span is not request)
    first, second = (attribute(span, "decode_worker") for span in tracing.named("open"))
    assert first != second
    assert (attribute(request, "migrations"), attribute(request, "output_tokens")) == (1, 9)
    assert attribute(request, "request_id") == "a request"


async def test_a_request_that_fails_ends_its_span_with_what_the_client_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracing = MemoryTracing()
    async with running_cluster(tmp_path, max_timeout_s=0.2, tracing=tracing) as cluster:
        cluster.script.before_first_token.clear()
        with pytest.raises(grpc.aio.AioRpcError):
            await cluster.generate(text_request(9), timeout_s=None)
        read = cluster.router.metrics.registry.get_sample_value
        assert read("baton_router_requests_total", {"outcome": "DeadlineExceeded"}) == 1
    (request,) = tracing.named("request")
    assert request.status.description == "DeadlineExceeded"
    (line,) = logged(caplog, "router")
    assert (line["request_id"], line["outcome"], line["output_tokens"]) == ("a request", "DeadlineExceeded", 0)


async def test_each_attempt_at_a_chunk_is_a_transfer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running() as harness:
        tracing = harness.worker.tracing = MemoryTracing()
        harness.decode.verdicts = [kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH]
        await harness.prefill(harness.request(num_tokens=22))
        await harness.settled()
        counters = harness.worker.counters.snapshot()
        grants_waiting = harness.worker.status().num_grants_waiting
    (prefill,) = tracing.named("prefill")
    assert all(is_child(span, prefill) for span in tracing.spans if span is not prefill)
    (queue,) = tracing.named("queue")
    chunks, transfers = tracing.named("chunk"), tracing.named("transfer")
    assert [(attribute(span, "first_block"), attribute(span, "num_blocks")) for span in chunks] == [(0, 4), (4, 2)]
    assert end_ns(queue) <= start_ns(chunks[0]) < end_ns(chunks[0]) <= start_ns(transfers[0])
    first_chunk = [span for span in transfers if attribute(span, "chunk") == 0]
    assert [attribute(span, "is_verified") for span in first_chunk] == [False, True]
    assert {attribute(span, "lane") for span in transfers} == {"fake:lane"}
    assert counters["chunks_rejected_digest_mismatch"] == counters["chunks_resent"] == 1
    assert counters["grants"] == len(transfers) == counters["chunks_by_lane:fake:lane"] + 1
    assert grants_waiting == 0
    (line,) = logged(caplog, "prefill")
    assert (line["request_id"], line["outcome"], line["chunks_resent"]) == ("r", "ok", 1)
    assert line["bytes_shipped"] == counters["bytes_shipped"]


async def test_a_prompt_from_the_cache_has_no_chunk_for_it() -> None:
    async with running() as harness:
        await harness.prefill(harness.request(num_tokens=22))
        tracing = harness.worker.tracing = MemoryTracing()
        await harness.prefill(harness.request(num_tokens=22))
        await harness.settled()
        counters = harness.worker.counters.snapshot()
    (chunk,) = tracing.named("chunk")
    assert (attribute(chunk, "first_block"), attribute(chunk, "num_blocks")) == (5, 1)
    assert (counters["lookup_tokens"], counters["cached_tokens"]) == (40, 20)


async def test_a_prefill_that_fails_is_one_line_and_one_failed_span(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running() as harness:
        tracing = harness.worker.tracing = MemoryTracing()
        harness.ranks.is_manual = True
        with pytest.raises(DeadlineExceeded):
            await harness.prefill(harness.request(timeout_s=0.05))
    (prefill,) = tracing.named("prefill")
    assert prefill.status.description == "DeadlineExceeded"
    assert not tracing.named("chunk")
    (line,) = logged(caplog, "prefill")
    assert (line["outcome"], line["prefill_ms"]) == ("DeadlineExceeded", 0.0)


async def test_decodes_spans_hang_under_the_router_and_the_sender(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracing = MemoryTracing()
    async with running_front() as front:
        router = await Router(front).subscribed()
        now_ns = 1_000
        request, sender = (tracing.begin(name, traced_caller(), now_ns) for name in ("request", "sender"))
        ticket = router.open(1, num_tokens=10, max_tokens=4, span=request)
        prefill = Prefill(front, ticket, span=sender)
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 2)
        await ship(front, prefill, 1, 2, 1)
        prefill.finish(3)
        assert await router.end_of(1) == "FINISHED"
        await front.until_free()
        await router.leave()
        counters = front.worker.counters
        assert counters.snapshot()["grants"] == counters.snapshot()["chunks_verified"] == 2
        assert counters.queue_wait.count == 1
        assert counters.transfer_rate.bytes_per_s > 0
    (queue,), (decode,) = tracing.named("queue"), tracing.named("decode")
    receives, verifies = tracing.named("receive"), tracing.named("verify")
    parents = {span.parent.span_id for span in (*receives, *verifies) if span.parent is not None}
    assert len(receives) == len(verifies) == 2
    assert len(parents) == 1
    assert queue.parent is not None
    assert queue.parent.span_id not in parents
    assert end_ns(verifies[-1]) <= start_ns(queue) <= end_ns(queue) == start_ns(decode)
    assert attribute(decode, "num_tokens") == 3
    (line,) = logged(caplog, "decode")
    assert (line["request_id"], line["outcome"], line["output_tokens"]) == ("request", "ok", 3)


async def test_a_sequence_that_is_closed_before_its_first_step_has_no_decode_span(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tracing = MemoryTracing()
    async with running_front() as front:
        router = await Router(front).subscribed()
        router.open(1, span=tracing.begin("request", traced_caller(), 1_000))
        front.worker.close(router.session_id, 1)
        assert not tracing.spans
        (line,) = logged(caplog, "decode")
        assert (line["outcome"], line["output_tokens"]) == ("closed", 0)
        await router.leave()


async def test_a_prompt_that_decode_computes_itself_has_a_span_there() -> None:
    tracing = MemoryTracing()
    async with running_front() as front:
        router = await Router(front).subscribed()
        router.open_local(1, span=tracing.begin("request", traced_caller(), 1_000))
        assert await router.end_of(1) == "FINISHED"
        await router.leave()
        assert front.worker.counters.queue_wait.count == 1
    (queue,), (computed,), (decode,) = (tracing.named(name) for name in ("queue", "local_prefill", "decode"))
    assert end_ns(queue) == start_ns(computed)
    assert end_ns(computed) <= start_ns(decode)
