"""What a worker says and is no message, or what cannot be taken: its stream ends, and nothing else does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from baton.v1 import decode_pb2, inference_pb2, sampling_pb2, worker_pb2

from services.router.choice import Choice
from services.router.worker import Worker
from services.router.worker_list import Role
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FakeDecode, letters


def request(num_tokens: int = 6) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello")
    made.sampling.max_tokens = num_tokens
    return made


async def assert_serves(cluster: Cluster, num_moves: int) -> None:
    outputs = await cluster.generate(request())
    assert outputs[0].token_ids == letters(0, 6)
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.num_migrations == num_moves


async def test_a_garbled_session_ends_alone_and_comes_back(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_decodes=2) as cluster:

        async def garble(decode: FakeDecode) -> None:
            decode.garble_streams()
            await decode.wait_idle()

        cluster.script.at_position[3] = garble
        await assert_serves(cluster, num_moves=1)
        await cluster.wait_until(lambda: len(cluster.router.registry.candidates(Role.DECODE)) == 2)
        await assert_serves(cluster, num_moves=0)


async def test_a_garbled_prefill_is_computed_elsewhere(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_prefills=2) as cluster:
        cluster.script.num_garbled_prefills = 1
        await assert_serves(cluster, num_moves=1)


@pytest.mark.parametrize("role", list(Role))
async def test_a_garbled_status_ends_that_stream_alone_and_comes_again(tmp_path: Path, role: Role) -> None:
    async with running_cluster(tmp_path) as cluster:
        worker = cluster.prefills[0] if role is Role.PREFILL else cluster.decodes[0]
        worker.num_garbled_statuses = 1
        worker.set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until_serving(False)
        await cluster.wait_until_serving()
        assert worker.num_watches == 2
        await assert_serves(cluster, num_moves=0)


async def test_a_status_that_cannot_be_taken_is_logged_and_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_cluster(tmp_path) as cluster:
        update = Worker._update

        def fail_once(worker: Worker, status: worker_pb2.WorkerStatus) -> None:
            monkeypatch.setattr(Worker, "_update", update)
            raise RuntimeError("what nobody thought of")

        monkeypatch.setattr(Worker, "_update", fail_once)
        cluster.decodes[0].set_state(worker_pb2.WORKER_STATE_READY)
        await cluster.wait_until_serving(False)
        await cluster.wait_until_serving()
        await assert_serves(cluster, num_moves=0)
    assert [record.exc_info is not None for record in caplog.records if "cannot be taken" in record.message] == [True]


async def test_tokens_that_cannot_be_taken_end_their_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_cluster(tmp_path) as cluster:
        session = cluster.router.registry.worker(Role.DECODE, cluster.decodes[0].address).session
        accept = Choice.accept

        def fail_later(
            choice: Choice, token_ids: Sequence[int], logprobs: Sequence[sampling_pb2.PositionLogprobs]
        ) -> None:
            if len(choice.tokens) == 3:
                raise RuntimeError("what nobody thought of")
            accept(choice, token_ids, logprobs)

        monkeypatch.setattr(Choice, "accept", fail_later)
        cluster.script.before_decode.clear()
        responses = aiter(cluster.stub.Generate(request()))
        await anext(responses)
        cluster.script.before_decode.set()  # the others come over the session
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in responses:
                pass
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        monkeypatch.undo()
        assert session.stands
        await assert_serves(cluster, num_moves=0)
        assert len(cluster.decodes[0].sessions_begun) == 1
        await cluster.wait_all_closed()


async def test_a_session_that_can_write_no_more_is_given_up_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_cluster(tmp_path) as cluster:
        session = cluster.router.registry.worker(Role.DECODE, cluster.decodes[0].address).session

        class NotOurs(deque[decode_pb2.SessionRequest]):
            def popleft(self) -> decode_pb2.SessionRequest:
                monkeypatch.undo()
                raise RuntimeError("what nobody thought of")

        monkeypatch.setattr(session, "_outgoing", NotOurs())
        session.close(7)
        await cluster.wait_until(lambda: not session.stands)
        await cluster.wait_until(lambda: session.stands)
        await assert_serves(cluster, num_moves=0)
    failed = [record for record in caplog.records if record.message.startswith("writing to")]
    assert [record.exc_info is not None for record in failed] == [True]
