"""What a client sees of a healthy cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2, sampling_pb2, worker_pb2

from common.errors import DeadlineExceeded, InternalError, ResourceExhausted
from common.rpc.status import error_from_rpc
from services.router.attempt import RequestPlan
from services.router.choice import Choice
from services.router.dispatcher import Dispatcher
from services.router.worker_list import Role
from tests.router.byte_checkpoint import EOS_TOKEN_ID, USER_TOKEN_ID, byte_ids
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FakeWorker, letters


def text_request(max_tokens: int = 8, **fields: object) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text="hello", **fields)  # type: ignore[arg-type]
    request.sampling.max_tokens = max_tokens
    return request


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path) as running:
        yield running


async def test_tokens_and_text_stream_in_order(cluster: Cluster) -> None:
    outputs = await cluster.generate(text_request(8))
    assert outputs[0].token_ids == letters(0, 8)
    assert outputs[0].text == "abcdefgh"
    last = outputs[0].last
    assert last is not None
    assert last.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert last.usage == inference_pb2.Usage(num_prompt_tokens=5, num_output_tokens=8, num_cached_tokens=4)


async def test_first_message_names_request_and_seed(cluster: Cluster) -> None:
    request = text_request(2, request_id="mine")
    request.sampling.seed = 12345
    responses = [response async for response in cluster.stub.Generate(request)]
    assert responses[0].request_id == "mine"
    assert responses[0].seed == 12345
    assert not any(response.HasField("request_id") for response in responses[1:])
    assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]


async def test_the_sequence_is_fully_resolved(cluster: Cluster) -> None:
    await cluster.generate(text_request(3, tenant="acme"))
    sequence = cluster.decodes[0].opened[0]
    assert sequence == cluster.prefills[0].requests[0].sequence
    assert list(sequence.token_ids) == byte_ids("hello")
    assert sequence.num_prompt_tokens == 5
    assert sequence.tenant == "acme"
    assert list(sequence.eos_token_ids) == [EOS_TOKEN_ID]
    assert 0 < sequence.timeout_ns <= 21e9  # gRPC rounds deadlines up on the wire
    unset = {field.name for field in sequence.sampling.DESCRIPTOR.fields if field.has_presence}
    unset -= {field.name for field, _ in sequence.sampling.ListFields()}
    assert unset == {"logprobs"}


async def test_lifetime_says_what_served_the_request(cluster: Cluster) -> None:
    outputs = await cluster.generate(text_request(3))
    assert outputs[0].last is not None
    lifetime = outputs[0].last.lifetime
    assert (lifetime.prefill_worker, lifetime.decode_worker) == ("prefill-0", "decode-0")
    assert (lifetime.prefill_ns, lifetime.num_blocks_shipped, lifetime.transport) == (2, 3, "inproc:queue")
    assert (lifetime.decode_queue_ns, lifetime.decode_ns, lifetime.num_migrations) == (5, 7, 0)
    assert 0 < lifetime.time_to_first_token_ns <= lifetime.total_ns


async def test_last_message_waits_for_prefill_completed(cluster: Cluster) -> None:
    cluster.script.before_completed.clear()
    responses = aiter(cluster.stub.Generate(text_request(3)))
    tokens: list[int] = []
    while len(tokens) < 2:
        tokens += (await anext(responses)).token_ids
    cluster.script.before_completed.set()
    last = [response async for response in responses][-1]
    assert last.lifetime.prefill_ns == 2


async def test_a_first_token_that_ends_the_output_closes_decode(cluster: Cluster) -> None:
    outputs = await cluster.generate(text_request(1))
    assert outputs[0].token_ids == letters(0, 1)
    await cluster.wait_all_closed()
    assert cluster.decodes[0].closed == [cluster.decodes[0].opened[0].sequence_id]
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.prefill_ns == 2


async def test_eos_is_a_token_and_no_text(cluster: Cluster) -> None:
    cluster.script.token_at = lambda choice, position: EOS_TOKEN_ID if position == 3 else byte_ids("x")[0]
    outputs = await cluster.generate(text_request(8))
    assert outputs[0].token_ids == [*byte_ids("xxx"), EOS_TOKEN_ID]
    assert outputs[0].text == "xxx"
    assert outputs[0].last is not None
    assert outputs[0].last.finish_reason == sampling_pb2.FINISH_REASON_STOP


async def test_ignore_eos_sends_no_eos_tokens_to_the_workers(cluster: Cluster) -> None:
    cluster.script.token_at = lambda choice, position: EOS_TOKEN_ID if position == 1 else byte_ids("x")[0]
    request = text_request(4)
    request.sampling.ignore_eos = True
    outputs = await cluster.generate(request)
    assert len(outputs[0].token_ids) == 4
    assert outputs[0].text == "xxx"
    assert not cluster.decodes[0].opened[0].eos_token_ids


@pytest.mark.parametrize(("include", "text"), [(False, "abc"), (True, "abcdef")])
@pytest.mark.parametrize("tokens_per_batch", [1, 2, 3, 50])
async def test_a_stop_string_across_batches_ends_the_output(
    cluster: Cluster, tokens_per_batch: int, include: bool, text: str
) -> None:
    cluster.script.tokens_per_batch = tokens_per_batch
    outputs = await cluster.generate(text_request(100, stop=["def", "zzz"], include_stop_in_output=include))
    assert outputs[0].text == text
    assert outputs[0].token_ids == letters(0, 6)
    assert outputs[0].last is not None
    assert outputs[0].last.finish_reason == sampling_pb2.FINISH_REASON_STOP
    await cluster.wait_all_closed()


async def test_a_stop_string_in_the_first_token_cancels_prefill_and_closes_decode(cluster: Cluster) -> None:
    cluster.script.before_completed.clear()
    outputs = await cluster.generate(text_request(100, stop=["a"]))
    assert outputs[0].text == ""
    assert outputs[0].token_ids == letters(0, 1)
    await asyncio.wait_for(cluster.prefills[0].cancelled.wait(), 20)
    await cluster.wait_all_closed()


async def test_text_held_back_for_a_stop_string_comes_at_the_end(cluster: Cluster) -> None:
    outputs = await cluster.generate(text_request(4, stop=["cdX"]))
    assert outputs[0].text == "abcd"


async def test_stop_token_ids_end_the_output_without_text(cluster: Cluster) -> None:
    request = text_request(50)
    request.sampling.stop_token_ids.extend(byte_ids("e"))
    outputs = await cluster.generate(request)
    assert outputs[0].token_ids == letters(0, 5)
    assert outputs[0].text == "abcd"


@pytest.mark.parametrize(("include", "text"), [(False, "xxx"), (True, "xxx<user>")])
@pytest.mark.parametrize("tokens_per_batch", [1, 2, 50])
async def test_a_stop_string_that_is_a_special_token_ends_the_output_at_that_token(
    cluster: Cluster, tokens_per_batch: int, include: bool, text: str
) -> None:
    cluster.script.tokens_per_batch = tokens_per_batch
    cluster.script.token_at = lambda choice, position: USER_TOKEN_ID if position == 3 else byte_ids("x")[0]
    request = text_request(50, stop=["zzz", "<user>"], include_stop_in_output=include)
    request.sampling.stop_token_ids.append(7)
    outputs = await cluster.generate(request)
    assert outputs[0].token_ids == [*byte_ids("xxx"), USER_TOKEN_ID]
    assert outputs[0].text == text
    assert outputs[0].last is not None
    assert outputs[0].last.finish_reason == sampling_pb2.FINISH_REASON_STOP
    assert list(cluster.decodes[0].opened[0].sampling.stop_token_ids) == [7, USER_TOKEN_ID]


async def test_a_stop_string_is_found_as_text_although_it_is_a_special_token_too(cluster: Cluster) -> None:
    spelled = byte_ids("ab<user>cd")
    cluster.script.token_at = lambda choice, position: spelled[position]
    outputs = await cluster.generate(text_request(10, stop=["<user>"]))
    assert outputs[0].text == "ab"


async def test_stop_strings_that_are_tokens_count_as_stop_tokens(cluster: Cluster) -> None:
    request = text_request(5, stop=["<user>"])
    request.sampling.stop_token_ids.extend(range(1, 65))
    with pytest.raises(grpc.aio.AioRpcError, match=r"stop = 65: .*at most 64") as caught:
        await cluster.generate(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("tokens_per_batch", [1, 3])
async def test_logprobs_match_their_tokens(cluster: Cluster, tokens_per_batch: int) -> None:
    cluster.script.tokens_per_batch = tokens_per_batch
    request = text_request(7)
    request.sampling.logprobs = 1
    outputs = await cluster.generate(request)
    assert outputs[0].logprob_ids == outputs[0].token_ids == letters(0, 7)


async def test_choices_differ_and_each_ends_once(cluster: Cluster) -> None:
    outputs = await cluster.generate(text_request(5, n=4))
    assert {index: output.token_ids for index, output in outputs.items()} == {c: letters(c, 5) for c in range(4)}
    assert all(output.last is not None for output in outputs.values())
    usages = [output.last.usage for output in outputs.values() if output.last and output.last.HasField("usage")]
    assert [usage.num_output_tokens for usage in usages] == [20]


async def test_other_choices_wait_for_the_leaders_prefill(cluster: Cluster) -> None:
    cluster.script.before_completed.clear()
    responses = aiter(cluster.stub.Generate(text_request(5, n=3)))
    first = await anext(responses)
    assert first.choice == 0
    assert cluster.num_opened == 1
    cluster.script.before_completed.set()
    assert {response.choice async for response in responses} == {0, 1, 2}
    assert [sequence.choice for sequence in cluster.decodes[0].opened] == [0, 1, 2]


async def test_chat_is_rendered_with_the_template(cluster: Cluster) -> None:
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    )
    request.sampling.max_tokens = 1
    await cluster.generate(request)
    assert list(cluster.decodes[0].opened[0].token_ids) == byte_ids("user:hi;")


async def test_max_tokens_defaults_to_what_the_context_allows(cluster: Cluster) -> None:
    cluster.script.tokens_per_batch = 100
    outputs = await cluster.generate(inference_pb2.GenerateRequest(text="hello"))
    assert len(outputs[0].token_ids) == 512 - 5


async def test_a_client_that_goes_away_releases_both_workers(cluster: Cluster) -> None:
    cluster.script.before_completed.clear()
    cluster.script.before_decode.clear()
    call = cluster.stub.Generate(text_request(50))
    await anext(aiter(call))
    call.cancel()
    await asyncio.wait_for(cluster.prefills[0].cancelled.wait(), 20)
    await cluster.wait_all_closed()


async def test_a_client_that_goes_away_before_the_first_token_releases_both_workers(cluster: Cluster) -> None:
    cluster.script.before_first_token.clear()
    call = cluster.stub.Generate(text_request(50))
    reading = asyncio.ensure_future(anext(aiter(call)))
    await cluster.prefills[0].entered.wait()
    call.cancel()
    await asyncio.wait_for(cluster.prefills[0].cancelled.wait(), 20)
    await cluster.wait_all_closed()
    await asyncio.wait([reading])
    assert cluster.router.admission.queue.num_in_flight == 0


async def test_a_deadline_ends_everything(cluster: Cluster) -> None:
    cluster.script.before_decode.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(text_request(50), timeout_s=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.wait_all_closed()


async def test_the_routers_own_limit_caps_the_deadline(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, max_timeout_s=3.0) as cluster:
        cluster.script.before_first_token.clear()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(text_request(50), timeout_s=None)
        assert isinstance(error_from_rpc(caught.value), DeadlineExceeded)
        assert cluster.decodes[0].opened[0].timeout_ns <= 3e9
        await cluster.wait_all_closed()


async def test_a_deadline_that_has_passed_reaches_no_worker(cluster: Cluster) -> None:
    class Late:
        def time_remaining(self) -> float:
            return 0.0

    with pytest.raises(DeadlineExceeded):
        await cluster.router.servicer.Generate(text_request(5), Late())  # type: ignore[arg-type]
    assert cluster.num_opened == 0


async def test_outcomes_and_tokens_are_counted(cluster: Cluster) -> None:
    await cluster.generate(text_request(5, n=2))
    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.generate(text_request(5, n=99))
    read = cluster.router.metrics.registry.get_sample_value
    assert read("baton_router_requests_total", {"outcome": "ok"}) == 1
    assert read("baton_router_requests_total", {"outcome": "InvalidArgument"}) == 1
    assert read("baton_router_output_tokens_total") == 10
    assert read("baton_router_sequences_in_flight") == 0
    assert read("baton_router_workers_ready", {"role": "decode"}) == 1
    assert read("baton_router_time_to_first_token_seconds_count") == 1
    # Gaps between messages: what waits for a client is merged, so there may be fewer than gaps between tokens.
    assert 1 <= (read("baton_router_inter_token_seconds_count") or 0) <= 10 - 2
    assert read("baton_router_request_duration_seconds_count") == 2


async def test_a_full_router_refuses_with_a_hint(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, max_in_flight=16, max_waiting=0) as cluster:
        cluster.script.before_first_token.clear()
        wide = asyncio.ensure_future(cluster.generate(text_request(2, n=16)))
        await cluster.prefills[0].entered.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.generate(text_request(2))
        error = error_from_rpc(caught.value)
        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s > 0
        assert cluster.num_opened == 1
        cluster.script.before_first_token.set()
        assert len(await wide) == 16


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_request_that_would_wait_for_too_long_is_refused_at_once(cluster: Cluster, role: Role) -> None:
    worker: FakeWorker = cluster.prefills[0] if role is Role.PREFILL else cluster.decodes[0]
    worker.status.num_waiting_tokens, worker.status.num_open = 30_000, 130
    worker.status.num_at_once, worker.status.load_unit_ns = (0, 10**6) if role is Role.PREFILL else (30, 3 * 10**8)
    worker.set_state(worker_pb2.WORKER_STATE_READY)
    registry = cluster.router.registry
    await cluster.wait_until(lambda: any(c.wait_s > 0 for c in registry.candidates(role)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(text_request(3), timeout_s=10.0)
    error = error_from_rpc(caught.value)
    assert isinstance(error, ResourceExhausted)
    assert 20 < error.retry_after_s < 30
    assert cluster.num_opened == 0
    assert (await cluster.generate(text_request(3), timeout_s=60.0))[0].token_ids == letters(0, 3)


async def test_a_waiting_request_is_served_when_a_place_comes_free(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, max_in_flight=16) as cluster:
        cluster.script.before_first_token.clear()
        wide = asyncio.ensure_future(cluster.generate(text_request(2, n=16)))
        await cluster.prefills[0].entered.wait()
        late = asyncio.ensure_future(cluster.generate(text_request(3)))
        cluster.script.before_first_token.set()
        await wide
        assert (await late)[0].token_ids == letters(0, 3)


async def test_a_slow_client_gets_merged_messages(cluster: Cluster) -> None:
    cluster.script.before_decode.clear()
    responses = aiter(cluster.stub.Generate(text_request(500)))
    token_ids = list((await anext(responses)).token_ids)
    cluster.script.before_decode.set()
    await cluster.decodes[0].wait_idle()
    async for response in responses:
        token_ids += response.token_ids
    assert token_ids == letters(0, 500)


async def test_model_info_counts_ready_workers(cluster: Cluster) -> None:
    info = await cluster.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.model, info.context_length, info.vocab_size) == ("bytes", 512, 300)
    assert (info.num_prefill_workers, info.num_decode_workers, info.block_size) == (1, 1, 64)
    assert info.is_serving
    assert info.has_chat_template
    assert list(info.eos_token_ids) == [EOS_TOKEN_ID]


async def test_many_requests_at_once_keep_their_tokens_apart(cluster: Cluster) -> None:
    outputs = await asyncio.gather(*(cluster.generate(text_request(size)) for size in range(2, 42)))
    for size, output in zip(range(2, 42), outputs, strict=True):
        assert output[0].token_ids == letters(0, size)
    assert cluster.router.admission.queue.num_in_flight == 0


async def test_a_failure_during_the_first_write_reaches_the_client(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail_while_writing(self: Dispatcher, plan: RequestPlan, choices: Sequence[Choice]) -> None:
        choices[0].accept(letters(0, 1), [])
        for _ in range(3):  # the writer wakes and hands the message to gRPC, whose own thread then sends it
            await asyncio.sleep(0)
        raise InternalError("it failed")

    monkeypatch.setattr(Dispatcher, "run", fail_while_writing)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(text_request(8), timeout_s=5.0)
    assert isinstance(error_from_rpc(caught.value), InternalError)
