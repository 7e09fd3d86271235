"""A real deployment under a few requests: its metrics, its traces and its logs tell what was sent."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from cli.deployment import Deployment, DeploymentSpec
from cli.scrape import Scrape, scrape
from common.errors import InvalidArgument
from common.telemetry.metrics import Metrics
from common.worker.free_port import free_ports
from services.decode.metrics import DecodeMetrics
from services.prefill.metrics import PrefillMetrics
from services.router.metrics import RouterMetrics
from tests.faults.settling import watching
from tests.integration.deployments import deployed
from tests.integration.requests import Answer, ask, greedy_request
from tests.telemetry.collector import CollectedSpan, Collector, collecting
from tests.telemetry.declared import declared_samples

NUM_BLOCKS = 64
PROMPTS = ([7] * 300, [7] * 300 + [8] * 100, [9] * 20)
NUM_TOKENS = (6, 8, 1)  # the last needs no decode step
FIRST_STEP_TOKENS = "128"  # so that the longer prompts come in several chunks


async def test_metrics_traces_and_logs_tell_what_was_sent(shipped_model: Path, tmp_path: Path) -> None:
    ports = dict(zip(("router", "prefill", "decode"), free_ports(3), strict=True))
    async with collecting() as collector:
        args = {
            role: ("--metrics-port", str(port), "--otlp-endpoint", collector.endpoint) for role, port in ports.items()
        }
        blocks = ("--num-blocks", str(NUM_BLOCKS))
        spec = DeploymentSpec(
            model=shipped_model,
            prefill_args=(*args["prefill"], *blocks, "--max-step-tokens", FIRST_STEP_TOKENS),
            decode_args=(*args["decode"], *blocks),
            router_args=args["router"],
            log_dir=tmp_path,
            restart=False,
        )
        async with deployed(spec) as (deployment, client):
            before = {role: await _scrape(port) for role, port in ports.items()}
            answers = await _send(deployment, client)
            after = {role: await _scrape(port) for role, port in ports.items()}
    _every_series_is_there_before_the_first_request(before)
    _router_counts(after["router"], answers)
    _prefill_counts(after["prefill"], answers)
    _decode_counts(after["decode"], answers)
    request_ids = _logs_name_the_same_requests(tmp_path)
    _traces_are_whole(collector, request_ids)


async def _scrape(port: int) -> Scrape:
    return await scrape(f"http://127.0.0.1:{port}/metrics", timeout_s=5.0)


async def _send(deployment: Deployment, client: Client) -> list[Answer]:
    async with watching(deployment.prefill[0]) as prefill, watching(deployment.decode[0]) as decode:
        answers = [
            await ask(client, greedy_request(prompt, num_tokens))
            for prompt, num_tokens in zip(PROMPTS, NUM_TOKENS, strict=True)
        ]
        with pytest.raises(InvalidArgument):
            await ask(client, greedy_request([1 << 30], 1))
        # A worker may count a moment after the client has its answer.
        await prefill.until(lambda status: status.counters["requests_completed"] == len(PROMPTS), 5.0)
        await decode.until(lambda status: status.num_waiting + status.num_running == 0, 5.0)
    return answers


def _every_series_is_there_before_the_first_request(scrapes: dict[str, Scrape]) -> None:
    prefill, decode, router = PrefillMetrics(), DecodeMetrics(), RouterMetrics()
    declared: dict[str, Metrics] = {"prefill": prefill, "decode": decode, "router": router}
    for role, metrics in declared.items():
        assert declared_samples(metrics) == set(scrapes[role].samples)
    for role, name in (("prefill", "prompt_tokens"), ("decode", "output_tokens"), ("router", "messages")):
        assert scrapes[role].value(f"baton_{role}_{name}_total") == 0
    assert scrapes["router"].value("baton_router_requests_total", outcome="ok") == 0


def _router_counts(scraped: Scrape, answers: list[Answer]) -> None:
    value, num = scraped.value, len(answers)
    assert value("baton_router_requests_total", outcome="ok") == num
    assert value("baton_router_requests_total", outcome="InvalidArgument") == 1
    assert value("baton_router_requests_total", outcome="Unavailable") == 0
    assert value("baton_router_prompt_tokens_total") == sum(map(len, PROMPTS))
    assert value("baton_router_output_tokens_total") == sum(NUM_TOKENS) == sum(len(a.tokens) for a in answers)
    assert value("baton_router_time_to_first_token_seconds_count") == num
    assert value("baton_router_queue_wait_seconds_count") == num
    assert value("baton_router_placement_wait_seconds_count") == num
    assert value("baton_router_request_duration_seconds_count") == num + 1
    longest_s = max(answer.lifetime.time_to_first_token_ns for answer in answers) / 1e9
    assert 0 < value("baton_router_time_to_first_token_seconds_sum") <= num * longest_s
    assert value("baton_router_sequences_in_flight") == 0
    assert (
        value("baton_router_workers_ready", role="prefill") == value("baton_router_workers_ready", role="decode") == 1
    )


def _prefill_counts(scraped: Scrape, answers: list[Answer]) -> None:
    value = scraped.value
    assert value("baton_prefill_requests_total", outcome="completed") == len(answers)
    assert value("baton_prefill_prompt_tokens_total") == sum(map(len, PROMPTS))
    assert value("baton_prefill_output_tokens_total") == len(answers)
    num_in_full_blocks = sum(len(prompt) // 64 * 64 for prompt in PROMPTS)
    assert value("baton_prefill_prefix_cache_query_tokens_total") == num_in_full_blocks
    assert value("baton_prefill_prefix_cache_hit_tokens_total") == 4 * 64  # of the second prompt
    num_computed = sum(map(len, PROMPTS)) - 4 * 64
    assert value("baton_prefill_step_tokens_sum") == num_computed
    num_steps = value("baton_prefill_steps_total")
    assert num_steps == value("baton_prefill_step_duration_seconds_count") >= 3 + 2 + 1
    assert value("baton_prefill_queue_wait_seconds_count") == len(answers)
    num_shipped = sum(answer.lifetime.num_blocks_shipped for answer in answers)
    assert value("baton_prefill_blocks_shipped_total") == num_shipped > 0
    assert value("baton_prefill_blocks_reused_total") == sum(answer.lifetime.num_blocks_reused for answer in answers)
    assert value("baton_prefill_transfer_bytes_total") == sum(answer.lifetime.bytes_shipped for answer in answers)
    assert value("baton_prefill_lane_info", lane="ucx:tcp") == 1
    assert 0 < value("baton_prefill_lane_chunks_total", lane="ucx:tcp") <= value("baton_prefill_grants_total")
    assert value("baton_prefill_transfer_rate_bytes_per_second") > 0
    _nothing_is_held(scraped, "prefill")


def _decode_counts(scraped: Scrape, answers: list[Answer]) -> None:
    value = scraped.value
    assert value("baton_decode_sequences_opened_total") == len(answers)
    num_verified = value("baton_decode_chunks_verified_total")
    num_decoded = sum(1 for num_tokens in NUM_TOKENS if num_tokens > 1)
    assert value("baton_decode_sequences_ended_total", outcome="finished") == num_decoded
    assert value("baton_decode_sequences_ended_total", outcome="closed") == len(answers) - num_decoded
    assert value("baton_decode_output_tokens_total") == sum(NUM_TOKENS) - len(answers)
    assert value("baton_decode_queue_wait_seconds_count") == num_decoded
    assert value("baton_decode_prefix_cache_hit_tokens_total") == 64 * value("baton_decode_blocks_reused_total") > 0
    assert value("baton_decode_step_rows_count") == value("baton_decode_steps_total")
    num_rows = value("baton_decode_output_tokens_total") + value("baton_decode_discarded_tokens_total")
    assert value("baton_decode_step_rows_sum") == num_rows
    assert value("baton_decode_step_gap_seconds_count") > 0
    # The last request ends with its first token: its one chunk may have been granted, and was not wanted any more.
    assert 0 < num_verified <= value("baton_decode_grants_total") <= num_verified + 1
    assert value("baton_decode_chunks_rejected_total", reason="digest_mismatch") == 0
    num_bytes = sum(answer.lifetime.bytes_shipped for answer in answers[:num_decoded])
    assert value("baton_decode_transfer_bytes_total") == num_bytes
    assert value("baton_decode_transfer_duration_seconds_count") == num_verified
    _nothing_is_held(scraped, "decode")


def _nothing_is_held(scraped: Scrape, role: str) -> None:
    blocks = {s: scraped.value(f"baton_{role}_blocks", state=s) for s in ("free", "cached", "held")}
    assert sum(blocks.values()) == NUM_BLOCKS
    assert blocks["held"] == 0 < blocks["cached"]
    assert scraped.value(f"baton_{role}_slots", state="in_use") == 0
    assert scraped.value(f"baton_{role}_grants_waiting") == 0
    assert scraped.value(f"baton_{role}_ready") == 1


def _logs_name_the_same_requests(log_dir: Path) -> list[str]:
    """Ids of the requests that went well, in order."""
    lines = {role: _request_lines(log_dir / f"{name}.log", role) for role, name in _LOG_FILES.items()}
    ok = [line["request_id"] for line in lines["router"] if line["outcome"] == "ok"]
    assert len(set(ok)) == len(PROMPTS)
    assert [line["request_id"] for line in lines["prefill"]] == ok
    assert [line["request_id"] for line in lines["decode"]] == ok
    assert [line["prompt_tokens"] for line in lines["prefill"]] == [len(prompt) for prompt in PROMPTS]
    assert [line["output_tokens"] for line in lines["decode"]] == [num - 1 for num in NUM_TOKENS]
    assert [line["outcome"] for line in lines["router"]] == ["ok"] * len(PROMPTS) + ["InvalidArgument"]
    return ok


_LOG_FILES = {"router": "router", "prefill": "prefill-0", "decode": "decode-0"}


def _request_lines(path: Path, role: str) -> list[dict[str, Any]]:
    marker = f"baton.{role}.request: "
    return [json.loads(line.split(marker)[1]) for line in path.read_text().splitlines() if marker in line]


def _traces_are_whole(collector: Collector, request_ids: list[str]) -> None:
    roots = {
        str(span.attributes["baton.request_id"]): span
        for span in collector.spans
        if span.name == "request" and span.attributes["baton.outcome"] == "ok"
    }
    assert list(roots) == request_ids
    for request_id, num_tokens in zip(request_ids, NUM_TOKENS, strict=True):
        root = roots[request_id]
        spans = [span for span in collector.spans if span.trace_id == root.trace_id]
        _children_are_within_their_parents(root, spans)
        _spans_come_in_order(spans, num_tokens)
    assert len({span.trace_id for span in collector.spans}) == len(request_ids) + 1, "and that which was refused"


def _children_are_within_their_parents(root: CollectedSpan, spans: list[CollectedSpan]) -> None:
    by_id = {span.span_id: span for span in spans}
    assert not root.parent_id
    parent_names = {"prefill": "request", "chunk": "prefill", "transfer": "prefill", "receive": "prefill"}
    for span in spans:
        if span is root:
            continue
        parent = by_id[span.parent_id]
        assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, f"{span.name} is not in {parent.name}"
        assert parent.name == parent_names.get(span.name, parent.name)
        if span.service == "baton-router" or span.name == "decode":
            assert parent is root


def _spans_come_in_order(spans: list[CollectedSpan], num_tokens: int) -> None:
    counts = Counter((span.service, span.name) for span in spans)
    once = ["tokenize", "place", "open", "request"]
    assert [counts["baton-router", name] for name in once] == [1] * len(once)
    assert counts["baton-prefill", "prefill"] == counts["baton-prefill", "queue"] == 1
    assert counts["baton-prefill", "chunk"] >= 1
    first = {(s.service, s.name): s for s in sorted(spans, key=lambda span: span.start_ns, reverse=True)}
    queue, chunk = first["baton-prefill", "queue"], first["baton-prefill", "chunk"]
    assert first["baton-router", "open"].end_ns <= queue.start_ns <= queue.end_ns <= chunk.start_ns
    if num_tokens == 1:
        assert counts["baton-decode", "decode"] == 0
        return
    transfers = [span for span in spans if span.name == "transfer"]
    assert counts["baton-decode", "receive"] == counts["baton-decode", "verify"] == len(transfers) >= 1
    assert chunk.end_ns <= min(span.start_ns for span in transfers)
    assert all(
        span.attributes["baton.lane"] == "ucx:tcp" and span.attributes["baton.is_verified"] for span in transfers
    )
    decode = first["baton-decode", "decode"]
    assert max(span.end_ns for span in spans if span.name == "verify") <= decode.start_ns
    assert first["baton-decode", "queue"].end_ns == decode.start_ns
    assert decode.attributes["baton.num_tokens"] == num_tokens - 1
