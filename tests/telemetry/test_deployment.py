"""A real deployment under a load test: its metrics, its traces and its logs tell what the client counted itself."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cli.client import Client
from cli.deployment import Deployment, DeploymentSpec
from cli.scrape import Scrape, scrape
from common.errors import InvalidArgument
from common.telemetry.metrics import Metrics
from common.worker.free_port import free_ports
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.record import OK, RequestRecord
from loadtest.sizes import TraceSizes
from loadtest.targets.base import TargetSpec
from loadtest.traces import Trace, TraceRow
from loadtest.workload import Workload
from services.decode.metrics import DecodeMetrics
from services.prefill.metrics import PrefillMetrics
from services.router.metrics import RouterMetrics
from tests.faults.settling import holds_nothing, watching
from tests.integration.deployments import deployed
from tests.integration.requests import ask, greedy_request
from tests.telemetry.collector import collecting
from tests.telemetry.declared import declared_samples
from tests.telemetry.whole_traces import traces_are_whole

NUM_BLOCKS = 256
NUM_REQUESTS = 60
RATE = 60.0  # requests/s: several are computed at once
STEP_TOKENS = "128"  # so that the longer prompts come in several chunks
SCALE = 0.25  # a block of a trace is 128 tokens then
SIZES = ((1200, 24), (1600, 32), (320, 4), (80, 48))  # before scaling: the third needs no decode step

Scrapes = dict[str, list[Scrape]]  # by role, in order of time


def _row(index: int) -> TraceRow:
    """Two prefixes are shared, each by half of the requests."""
    num_prompt, num_output = SIZES[index % len(SIZES)]
    own = tuple(range(10 * index + 10, 10 * index + 9 + -(-num_prompt // 512)))
    return TraceRow(0.0, num_prompt, num_output, (index // 2 % 2, *own))


async def test_metrics_traces_and_logs_tell_what_was_sent(shipped_model: Path, tmp_path: Path) -> None:
    ports = dict(zip(("router", "prefill", "decode"), free_ports(3), strict=True))
    async with collecting() as collector:
        args = {
            role: ("--metrics-port", str(port), "--otlp-endpoint", collector.endpoint) for role, port in ports.items()
        }
        blocks = ("--num-blocks", str(NUM_BLOCKS))
        spec = DeploymentSpec(
            model=shipped_model,
            prefill_args=(*args["prefill"], *blocks, "--max-step-tokens", STEP_TOKENS),
            decode_args=(*args["decode"], *blocks),
            router_args=args["router"],
            log_dir=tmp_path,
            restart=False,
        )
        async with deployed(spec) as (deployment, client):
            scrapes: Scrapes = {role: [] for role in ports}
            await _scrape_all(ports, scrapes)
            records = await _send(deployment, client, ports, scrapes)
            await _scrape_all(ports, scrapes)
    _every_series_is_there_before_the_first_request(scrapes)
    _scrapes_agree_with_each_other(scrapes)
    logs = {role: _request_lines(tmp_path / f"{name}.log") for role, name in _LOG_FILES.items()}
    _router_counts(scrapes["router"][-1], records)
    _prefill_counts(scrapes["prefill"][-1], records, logs["prefill"])
    _decode_counts(scrapes["decode"][-1], records, logs["prefill"])
    _transfers_are_counted_alike(scrapes["prefill"][-1], scrapes["decode"][-1])
    _logs_name_the_same_requests(logs, records)
    traces_are_whole(collector, records)


async def _scrape_all(ports: dict[str, int], scrapes: Scrapes) -> None:
    for role, port in ports.items():
        scrapes[role].append(await scrape(f"http://127.0.0.1:{port}/metrics", timeout_s=20.0))


async def _send(
    deployment: Deployment, client: Client, ports: dict[str, int], scrapes: Scrapes
) -> tuple[RequestRecord, ...]:
    """A load test that is scraped all the time, and one request that is refused."""
    target = TargetSpec("baton", deployment.router_address)
    rows = Trace("mixed", 0, tuple(_row(index) for index in range(NUM_REQUESTS)))
    workload = Workload(Arrivals(RATE), TraceSizes(rows, SCALE), seed=7, num_requests=NUM_REQUESTS)
    test = LoadTest(target, await describe_target(target), workload, timeout_s=60.0)
    async with watching(deployment.prefill[0]) as prefill, watching(deployment.decode[0]) as decode:
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(run_load_test(test, asyncio.Event(), Observed()))
            while not running.done():
                await _scrape_all(ports, scrapes)
                await asyncio.wait({running}, timeout=0.05)  # a scraper makes a new connection each time
        with pytest.raises(InvalidArgument):
            await ask(client, greedy_request([1 << 30], 1))
        # A worker may count a moment after the client has its answer.
        await prefill.until(lambda status: status.counters["requests_completed"] == NUM_REQUESTS, 20.0)
        await prefill.until(holds_nothing, 20.0)
        await decode.until(holds_nothing, 20.0)
    records = running.result().records
    assert [(record.outcome, record.num_output_tokens) for record in records] == [(OK, r.max_tokens) for r in records]
    assert len(records) == NUM_REQUESTS
    return records


def _every_series_is_there_before_the_first_request(scrapes: Scrapes) -> None:
    prefill, decode, router = PrefillMetrics(), DecodeMetrics(), RouterMetrics()
    declared: dict[str, Metrics] = {"prefill": prefill, "decode": decode, "router": router}
    for role, metrics in declared.items():
        assert declared_samples(metrics) == set(scrapes[role][0].samples)
    for role, name in (("prefill", "prompt_tokens"), ("decode", "output_tokens"), ("router", "messages")):
        assert scrapes[role][0].value(f"baton_{role}_{name}_total") == 0
    assert scrapes["router"][0].value("baton_router_requests_total", outcome="ok") == 0


def _scrapes_agree_with_each_other(scrapes: Scrapes) -> None:
    """Whenever one looks, the same series are there, and what counts has not gone back."""
    num_under_load = sum(one.value("baton_router_sequences_in_flight") > 0 for one in scrapes["router"])
    assert num_under_load >= 3, "the load was over before it was seen"
    for of_role in scrapes.values():
        for before, after in pairwise(of_role):
            assert set(after.samples) == set(before.samples)
            for key, value in before.samples.items():
                if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
                    assert after.samples[key] >= value, key


def _router_counts(scraped: Scrape, records: tuple[RequestRecord, ...]) -> None:
    value = scraped.value
    assert value("baton_router_requests_total", outcome="ok") == len(records)
    assert value("baton_router_requests_total", outcome="InvalidArgument") == 1
    assert scraped.total("baton_router_requests_total") == len(records) + 1
    assert value("baton_router_prompt_tokens_total") == sum(record.num_prompt_tokens for record in records)
    assert value("baton_router_output_tokens_total") == sum(record.num_output_tokens for record in records)
    assert value("baton_router_inter_token_seconds_count") == sum(len(record.gaps_s) for record in records)
    assert value("baton_router_time_to_first_token_seconds_count") == len(records)
    assert value("baton_router_queue_wait_seconds_count") == len(records)
    assert value("baton_router_placement_wait_seconds_count") == len(records)
    assert value("baton_router_request_duration_seconds_count") == len(records) + 1
    # The client's own account has the way to the router and back in it as well.
    waited_s = sum(record.arrivals[0].at_s - record.sent_s for record in records)
    assert 0 < value("baton_router_time_to_first_token_seconds_sum") <= waited_s
    assert value("baton_router_sequences_in_flight") == 0
    assert (
        value("baton_router_workers_ready", role="prefill") == value("baton_router_workers_ready", role="decode") == 1
    )


def _prefill_counts(scraped: Scrape, records: tuple[RequestRecord, ...], lines: list[dict[str, Any]]) -> None:
    value = scraped.value
    num_prompt_tokens = sum(record.num_prompt_tokens for record in records)
    num_cached_tokens = sum(record.num_cached_tokens for record in records)
    assert value("baton_prefill_requests_total", outcome="completed") == len(records)
    assert value("baton_prefill_prompt_tokens_total") == num_prompt_tokens
    assert value("baton_prefill_output_tokens_total") == len(records)
    num_in_full_blocks = sum(record.num_prompt_tokens // 64 * 64 for record in records)
    assert value("baton_prefill_prefix_cache_query_tokens_total") == num_in_full_blocks
    assert value("baton_prefill_prefix_cache_hit_tokens_total") == num_cached_tokens > 0
    assert value("baton_prefill_step_tokens_sum") == num_prompt_tokens - num_cached_tokens
    assert value("baton_prefill_step_rows_sum") > value("baton_prefill_step_rows_count"), "prompts share steps"
    num_steps = value("baton_prefill_steps_total")
    assert num_steps == value("baton_prefill_step_duration_seconds_count") == value("baton_prefill_step_rows_count")
    assert value("baton_prefill_queue_wait_seconds_count") == len(records)
    assert value("baton_prefill_blocks_shipped_total") == sum(line["blocks_shipped"] for line in lines) > 0
    assert value("baton_prefill_blocks_reused_total") == sum(line["blocks_reused"] for line in lines)
    assert value("baton_prefill_transfer_bytes_total") == sum(line["bytes_shipped"] for line in lines)
    assert value("baton_prefill_lane_info", lane="ucx:tcp") == 1
    assert 0 < value("baton_prefill_lane_chunks_total", lane="ucx:tcp") <= value("baton_prefill_grants_total")
    assert value("baton_prefill_transfer_rate_bytes_per_second") > 0
    _nothing_is_held(scraped, "prefill")


def _decode_counts(scraped: Scrape, records: tuple[RequestRecord, ...], lines: list[dict[str, Any]]) -> None:
    value = scraped.value
    num_decoded = sum(record.max_tokens > 1 for record in records)
    assert value("baton_decode_sequences_opened_total") == len(records)
    assert value("baton_decode_sequences_ended_total", outcome="finished") == num_decoded
    assert value("baton_decode_sequences_ended_total", outcome="closed") == len(records) - num_decoded
    assert scraped.total("baton_decode_sequences_ended_total") == len(records)
    num_tokens = sum(record.num_output_tokens for record in records) - len(records)  # the first ones are prefill's
    assert value("baton_decode_output_tokens_total") == num_tokens
    assert value("baton_decode_queue_wait_seconds_count") == num_decoded
    assert value("baton_decode_prefix_cache_hit_tokens_total") == 64 * value("baton_decode_blocks_reused_total") > 0
    assert value("baton_decode_step_rows_count") == value("baton_decode_steps_total")
    num_rows = num_tokens + value("baton_decode_discarded_tokens_total")
    assert value("baton_decode_step_rows_sum") == num_rows > value("baton_decode_step_rows_count"), (
        "sequences share steps"
    )
    assert value("baton_decode_step_gap_seconds_count") > 0
    assert value("baton_decode_chunks_rejected_total", reason="digest_mismatch") == 0
    _nothing_is_held(scraped, "decode")


def _transfers_are_counted_alike(prefill: Scrape, decode: Scrape) -> None:
    num_verified = decode.value("baton_decode_chunks_verified_total")
    # An output of one token does not need its prompt's two blocks, whose chunks may have been granted by then.
    num_unwanted = 2 * decode.value("baton_decode_sequences_ended_total", outcome="closed")
    assert 0 < num_verified <= decode.value("baton_decode_grants_total") <= num_verified + num_unwanted
    assert decode.value("baton_decode_transfer_duration_seconds_count") == num_verified
    num_bytes = decode.value("baton_decode_transfer_bytes_total")
    assert 0 < num_bytes <= prefill.value("baton_prefill_transfer_bytes_total")


def _nothing_is_held(scraped: Scrape, role: str) -> None:
    blocks = {s: scraped.value(f"baton_{role}_blocks", state=s) for s in ("free", "cached", "held")}
    assert sum(blocks.values()) == NUM_BLOCKS
    assert blocks["held"] == 0 < blocks["cached"]
    assert scraped.value(f"baton_{role}_slots", state="in_use") == 0
    assert scraped.value(f"baton_{role}_grants_waiting") == 0
    assert scraped.value(f"baton_{role}_ready") == 1


_LOG_FILES = {"router": "router", "prefill": "prefill-0", "decode": "decode-0"}


def _request_lines(path: Path) -> list[dict[str, Any]]:
    """Requests are the lines that are JSON."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def _logs_name_the_same_requests(logs: dict[str, list[dict[str, Any]]], records: tuple[RequestRecord, ...]) -> None:
    sent = {f"load-{record.index}": record for record in records}
    assert all(line["service"] == role for role, lines in logs.items() for line in lines)
    assert Counter(line["outcome"] for line in logs["router"]) == {"ok": len(records), "InvalidArgument": 1}
    for role, lines in logs.items():
        told = {line["request_id"]: line for line in lines if role != "router" or line["outcome"] == "ok"}
        assert told.keys() == sent.keys()
        for request_id, record in sent.items():
            assert told[request_id]["prompt_tokens"] == record.num_prompt_tokens
            if role == "prefill":
                assert told[request_id]["cached_tokens"] == record.num_cached_tokens
            else:
                num_first = int(role == "decode")  # the first token is prefill's
                assert told[request_id]["output_tokens"] == record.num_output_tokens - num_first
