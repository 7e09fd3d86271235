"""Workers come, go, drain and say nonsense; candidates are only those that can be used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from baton.v1 import decode_pb2, inference_pb2, sampling_pb2, worker_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import InvalidArgument, Unavailable
from common.models.checkpoint import drawn_model_digest, model_digest
from common.rpc.status import error_from_rpc
from services.router import server, worker_list
from services.router import worker as router_worker
from services.router.served_model import load_served_model
from services.router.validation import ModelLimits, ValidatedRequest, resolve_sampling
from services.router.worker_list import Role
from tests.router.byte_checkpoint import write_byte_checkpoint
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FINGERPRINT, FakeDecode, Script, Tickets, letters


async def wait_for_candidates(cluster: Cluster, role: Role, count: int) -> None:
    async with asyncio.timeout(20):
        while len(cluster.router.registry.candidates(role)) != count:
            await cluster.router.registry.wait_changed()


def write_workers(path: Path, prefill: list[str], decode: list[str]) -> None:
    path.write_text(f"prefill = {prefill!r}\ndecode = {decode!r}\n")


async def test_a_worker_joins_and_leaves_through_the_file(tmp_path: Path) -> None:
    file = tmp_path / "workers.toml"
    write_workers(file, [], [])
    extra = FakeDecode("extra", Script(), Tickets())
    await extra.start()
    async with running_cluster(tmp_path / "model", workers_file=file, workers_file_interval_s=0.01) as cluster:
        registry = cluster.router.registry
        write_workers(file, [], [extra.address])
        await wait_for_candidates(cluster, Role.DECODE, 2)
        file.write_text("decode = nonsense")
        write_workers(file, [], [])
        await wait_for_candidates(cluster, Role.DECODE, 1)
        assert registry.has_pair
    await extra.die()


async def test_a_worker_that_leaves_the_list_finishes_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "workers.toml"
    async with running_cluster(
        tmp_path / "model", num_decodes=0, workers_file=file, workers_file_interval_s=0.01
    ) as cluster:
        decode = FakeDecode("d", cluster.script, cluster.prefills[0]._tickets)
        await decode.start()
        write_workers(file, [], [decode.address])
        await cluster.wait_until_serving()
        cluster.script.before_decode.clear()
        request = inference_pb2.GenerateRequest(text="hi")
        request.sampling.max_tokens = 6
        responses = aiter(cluster.stub.Generate(request))
        token_ids = list((await anext(responses)).token_ids)
        write_workers(file, [], [])
        await wait_for_candidates(cluster, Role.DECODE, 0)
        cluster.script.before_decode.set()
        async for response in responses:
            token_ids += response.token_ids
        assert token_ids == letters(0, 6)
        assert len(decode.opened) == 1
        await decode.die()


async def test_a_draining_worker_is_no_candidate_and_health_follows(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        health: health_pb2_grpc.HealthStub = health_pb2_grpc.HealthStub(cluster.channel)
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest(service="baton.v1.Inference")))
        seen = (await anext(watch)).status
        if seen == health_pb2.HealthCheckResponse.NOT_SERVING:
            seen = (await anext(watch)).status
        assert seen == health_pb2.HealthCheckResponse.SERVING
        cluster.prefills[0].set_state(worker_pb2.WORKER_STATE_DRAINING)
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        cluster.prefills[0].set_state(worker_pb2.WORKER_STATE_READY)
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_worker_that_restarts_is_found_again(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.prefills[0].die()
        await cluster.wait_until_serving(False)
        await cluster.prefills[0].start()
        await cluster.wait_until_serving(True)


async def test_a_worker_that_is_listed_twice_keeps_both_sessions(tmp_path: Path) -> None:
    decode = FakeDecode("d", Script(), Tickets())
    await decode.start()
    addresses = (decode.address, f"localhost:{decode.address.rpartition(':')[2]}")
    async with running_cluster(tmp_path, num_decodes=0, decode=addresses) as cluster:
        await wait_for_candidates(cluster, Role.DECODE, 2)
        workers = [cluster.router.registry.worker(Role.DECODE, address) for address in addresses]
        assert len(decode.sessions_begun) == len(set(decode.sessions_begun)) == 2
        assert all(worker.session.stands for worker in workers)
    await decode.die()


async def test_workers_of_another_layout_are_not_paired(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        cluster.decodes[0].status.layout_fingerprint = "other"
        cluster.decodes[0].set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until_serving(False)


async def test_a_worker_listed_under_the_wrong_role_is_not_used(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        cluster.decodes[0].status.role = worker_pb2.WORKER_ROLE_PREFILL
        cluster.decodes[0].set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until_serving(False)


@pytest.mark.parametrize(
    "text", ['decode = ["127.0.0.1"]', 'decode = ["127.0.0.1:99999"]', 'prefill = ["two words:1"]', "router = []"]
)
def test_a_workers_file_that_names_no_workers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        worker_list.parse_workers(text)
    assert worker_list.parse_workers('decode = ["host:1", "[::1]:2"]') == {
        ("host:1", Role.DECODE),
        ("[::1]:2", Role.DECODE),
    }


async def test_a_wrong_role_and_a_bad_file_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "workers.toml"
    file.write_text("decode = nonsense")
    num_looks, looked = 0, asyncio.Event()

    def parse(text: str) -> set[tuple[str, Role]]:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 5:
            looked.set()
        raise ValueError("nonsense")

    monkeypatch.setattr(worker_list, "parse_workers", parse)
    async with running_cluster(tmp_path / "model", workers_file=file, workers_file_interval_s=0.01) as cluster:
        decode, registry = cluster.decodes[0], cluster.router.registry
        decode.status.role = worker_pb2.WORKER_ROLE_PREFILL
        worker = registry.worker(Role.DECODE, decode.address)

        def knows_load() -> bool:
            return worker.status is not None and worker.status.num_open == decode.status.num_open

        for num_open in range(1, 4):
            decode.status.num_open = num_open
            decode.set_state(worker_pb2.WORKER_STATE_READY)
            await cluster.wait_until(knows_load)
        await asyncio.wait_for(looked.wait(), 20)
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len([message for message in errors if "says it is none" in message]) == 1
    assert len([message for message in errors if "cannot be read" in message]) == 1


async def test_a_worker_of_another_model_is_not_used_whatever_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not say what it serves, as before there was a digest, is taken at its word."""
    async with running_cluster(tmp_path) as cluster:
        registry, decode = cluster.router.registry, cluster.decodes[0]
        registry.model_digests = frozenset({b"ours", b"ours, drawn"})
        for digest, is_used in (
            (b"other", False),
            (b"ours", True),
            (b"other", False),
            (b"ours, drawn", True),
            (b"", True),
        ):
            decode.status.model_digest = digest
            decode.set_state(worker_pb2.WORKER_STATE_READY)
            await cluster.wait_until_serving(is_used)
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len([message for message in errors if "not this router's model" in message]) == 2


def test_a_router_knows_workers_of_its_checkpoint_if_that_has_weights(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "checkpoints" / "pystdlib-7m"
    known = load_served_model("m", shipped, 1 << 20).digests
    assert known == {model_digest(shipped), drawn_model_digest(shipped)}
    assert load_served_model("m", write_byte_checkpoint(tmp_path), 1 << 20).digests == frozenset()


async def test_an_address_where_nobody_answers_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = asyncio.Event()
    note = router_worker.Worker._note_silence

    def observed(worker: router_worker.Worker) -> None:
        note(worker)
        noted.set()

    monkeypatch.setattr(router_worker, "SILENCE_S", 0.01)
    monkeypatch.setattr(router_worker.Worker, "_note_silence", observed)
    late = FakeDecode("late", Script(), Tickets())
    await late.start()
    await late.die()
    async with running_cluster(tmp_path, num_prefills=0, num_decodes=0, decode=(late.address,)) as cluster:
        await asyncio.wait_for(noted.wait(), 20)
        await late.start()
        await wait_for_candidates(cluster, Role.DECODE, 1)
    await late.die()
    messages = [record.message for record in caplog.records if late.address in record.message]
    assert [message for message in messages if "has not answered" in message] == [
        f"{late.address} has not answered for 0.01 s"
    ]


async def test_load_counts_what_was_dispatched_since_the_last_status(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        registry = cluster.router.registry
        worker = registry.worker(Role.DECODE, cluster.decodes[0].address)
        worker.acquire(3)
        assert registry.candidates(Role.DECODE)[0].load == 3
        cluster.decodes[0].status.num_open = 2
        cluster.decodes[0].set_state(worker_pb2.WORKER_STATE_READY)
        await registry.wait_changed()
        assert registry.candidates(Role.DECODE)[0].load == 2
        worker.release()


def held_by(cluster: Cluster) -> list[int]:
    """What the candidates can hold of a sequence."""
    return [c.max_sequence_tokens for role in Role for c in cluster.router.registry.candidates(role)]


async def test_a_sequence_is_no_longer_than_the_kv_caches_of_a_pair(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        for worker, capacity in ((cluster.decodes[0], 12), (cluster.prefills[0], 40)):
            worker.status.max_sequence_tokens = capacity
            worker.set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until(lambda: sorted(held_by(cluster)) == [12, 40])
        info = await cluster.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert info.context_length == 12
        outputs = await cluster.generate(inference_pb2.GenerateRequest(text="hello"))
        assert outputs[0].token_ids == letters(0, 7)
        for text, max_tokens, field in (("hello", 8, "sampling.max_tokens"), ("hello, world", 1, "text")):
            request = inference_pb2.GenerateRequest(text=text)
            request.sampling.max_tokens = max_tokens
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.generate(request)
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidArgument)
            assert error.field == field
            assert "context length 12" in error.limit
        assert cluster.num_opened == 1


async def test_max_tokens_is_resolved_by_workers_that_come_while_a_request_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    def observed(request: ValidatedRequest, num_tokens: int, limits: ModelLimits) -> sampling_pb2.SamplingParams:
        asked.set()
        return resolve_sampling(request, num_tokens, limits)

    monkeypatch.setattr(server, "resolve_sampling", observed)
    async with running_cluster(tmp_path) as cluster:
        workers = (*cluster.prefills, *cluster.decodes)
        for worker in workers:
            await worker.die()
        await cluster.wait_until(lambda: not any(cluster.router.registry.candidates(role) for role in Role))
        generating = asyncio.ensure_future(cluster.generate(inference_pb2.GenerateRequest(text="hello")))
        await asyncio.wait_for(asked.wait(), 20)
        for worker in workers:
            worker.status.max_sequence_tokens = 12
            await worker.start()
        assert (await generating)[0].token_ids == letters(0, 7)
        assert cluster.decodes[0].opened[0].sampling.max_tokens == 7


@pytest.mark.parametrize("fingerprint", [FINGERPRINT, "other"])
async def test_a_small_worker_refuses_nothing_that_another_holds(tmp_path: Path, fingerprint: str) -> None:
    async with running_cluster(tmp_path, num_decodes=2) as cluster:
        for worker, capacity in ((cluster.decodes[0], 6), (cluster.decodes[1], 20)):
            worker.status.max_sequence_tokens = capacity
        cluster.decodes[0].status.layout_fingerprint = fingerprint
        for worker in cluster.decodes:
            worker.set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until(lambda: {6, 20} <= set(held_by(cluster)))
        for text, num_tokens in (("hello, world", 8), ("hello", 1 if fingerprint == FINGERPRINT else 15)):
            outputs = await cluster.generate(inference_pb2.GenerateRequest(text=text))
            assert outputs[0].token_ids == letters(0, num_tokens)
        request = inference_pb2.GenerateRequest(text="hello")
        request.sampling.max_tokens = 15
        assert (await cluster.generate(request))[0].token_ids == letters(0, 15)


@pytest.mark.parametrize("large_comes_back", [True, False])
async def test_a_sequence_moves_only_to_workers_that_hold_it(tmp_path: Path, large_comes_back: bool) -> None:
    async with running_cluster(
        tmp_path, num_decodes=2, migration_timeout_s=20 if large_comes_back else 0, restart_timeout_s=0
    ) as cluster:
        registry = cluster.router.registry

        async def shrink_the_other(decode: FakeDecode) -> None:
            (other,) = (worker for worker in cluster.decodes if worker is not decode)
            other.status.max_sequence_tokens = 12
            other.set_state(worker_pb2.WORKER_STATE_READY)
            await cluster.wait_until(lambda: 12 in held_by(cluster))
            if not large_comes_back:
                decode.set_state(worker_pb2.WORKER_STATE_STARTING)
                await cluster.wait_until(lambda: len(registry.candidates(Role.DECODE)) == 1)

        cluster.script.at_position.update({4: shrink_the_other, 5: decode_pb2.SEQUENCE_END_LOST})
        generating = asyncio.ensure_future(cluster.generate(inference_pb2.GenerateRequest(text="hello")))
        if large_comes_back:
            assert (await generating)[0].token_ids == letters(0, 507)
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generating
            error = error_from_rpc(caught.value)
            assert isinstance(error, Unavailable)
            assert "too small for a sequence of up to 512 tokens" in str(error)
        assert sorted(len(decode.opened) for decode in cluster.decodes) == [0, 1 + large_comes_back]
