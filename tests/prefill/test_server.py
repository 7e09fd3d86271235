"""One Prefill call from end to end, and every way in which it can stop half-way: nothing is left behind."""

from __future__ import annotations

import asyncio

import pytest
from baton.v1 import kv_pb2, prefill_pb2, sampling_pb2, worker_pb2

from common import errors
from common.worker.step_plan import SampledToken
from services.prefill.decode_peers import HandoffStream
from services.prefill.handoff import Handoff
from services.prefill.handoff_chunk import Answer, Chunk
from tests.prefill.fakes import FIRST_TOKEN, Stage, drain
from tests.prefill.harness import BLOCK_SIZE, running

STAGES = ("begin", "offered", "granted", "arrived", "finish")


async def test_prompt_is_computed_shipped_and_joined() -> None:
    async with running() as harness:
        first, completed = await harness.prefill(harness.request(22))
        assert (first.token_id, first.finish_reason) == (FIRST_TOKEN, sampling_pb2.FINISH_REASON_UNSPECIFIED)
        assert not first.HasField("logprobs")
        assert harness.decode.finish == kv_pb2.HandoffFinish(first_token_id=FIRST_TOKEN, num_blocks=6)
        assert sum(offer.num_blocks * offer.num_layers for offer in harness.decode.offers) == 6 * 2
        assert all(offer.num_blocks * offer.num_layers <= 6 for offer in harness.decode.offers)
        assert completed.num_blocks_shipped == 6
        assert completed.bytes_shipped == sum(leg.num_bytes for _, leg in harness.ranks.sends)
        assert (completed.num_blocks_reused, completed.num_cached_tokens, completed.num_chunks_resent) == (0, 0, 0)
        assert completed.verify_ns == 5 * len(harness.decode.offers)
        assert min(completed.queue_ns, completed.prefill_ns, completed.grant_ns, completed.transfer_ns) > 0
        assert completed.transport == "fake:lane"
        assert completed.exposed_handoff_ns > 0
        status = await harness.settled()
        assert status.num_blocks_cached == 5
        assert status.counters["requests_completed"] == 1
        assert status.counters["blocks_shipped"] == 6


async def test_handoff_begins_with_who_we_are() -> None:
    async with running(tp_size=2) as harness:
        await harness.prefill(harness.request())
        begin = harness.decode.begin
        assert begin is not None
        assert (begin.ticket_id, begin.prefill_worker_id, begin.prefill_tp_size) == (77, "prefill-0", 2)
        assert begin.layout_fingerprint == "fingerprint"
        assert len(set(begin.rank_peer_names)) == 2


async def test_blocks_that_decode_holds_are_not_sent() -> None:
    async with running() as harness:
        harness.decode.num_blocks_reused = 4
        _, completed = await harness.prefill(harness.request(22))
        assert [(offer.first_block, offer.num_blocks) for offer in harness.decode.offers] == [(4, 2)]
        assert (completed.num_blocks_reused, completed.num_blocks_shipped) == (4, 2)
        await harness.settled()


async def test_only_the_tail_is_computed_and_sent_if_all_else_is_there() -> None:
    async with running() as harness:
        await harness.prefill(harness.request(22))
        harness.decode.offers.clear()
        harness.decode.num_blocks_reused = 5
        _, completed = await harness.prefill(harness.request(22))
        assert [(offer.first_block, offer.num_blocks) for offer in harness.decode.offers] == [(5, 1)]
        assert completed.num_cached_tokens == 5 * BLOCK_SIZE
        await harness.settled()


async def test_layers_are_granted_and_told_to_the_ranks_while_their_step_computes() -> None:
    async with running() as harness:
        harness.ranks.is_manual = True
        call = asyncio.create_task(harness.prefill(harness.request(40)))
        await harness.ranks.on_plan.wait()
        async with asyncio.timeout(5):
            await harness.ranks.on_held.wait()
        step_id = harness.ranks.plans[0].step_id
        leg = harness.ranks.sends[0][1]
        assert (leg.step_id, leg.first_layer, leg.num_layers, len(leg.block_ids)) == (step_id, 0, 1, 4)
        harness.ranks.answer_step()
        async with asyncio.timeout(5):
            while harness.ranks.sends[-1][1].step_id == step_id:
                harness.ranks.on_held.clear()
                await harness.ranks.on_held.wait()
        assert {offer.num_final_blocks for offer in harness.decode.offers if offer.first_block >= 4} == {4}
        assert not call.done()
        harness.ranks.is_manual = False
        while harness.ranks.plans:
            harness.ranks.answer_step()
        await call
        await harness.settled()


async def test_chunk_whose_grant_ran_out_is_offered_again_once_it_is_computed() -> None:
    async with running() as harness:
        harness.ranks.is_manual = harness.ranks.holds_sends = True
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        async with asyncio.timeout(5):
            await harness.ranks.on_held.wait()
            harness.ranks.finish_send("TransferTimeout")
            await harness.decode.rejected.wait()
        assert [offer.num_final_blocks for offer in harness.decode.offers] == [0]
        harness.ranks.holds_sends = False
        harness.ranks.is_manual = False
        harness.ranks.answer_step()
        _, completed = await call
        assert [offer.num_final_blocks for offer in harness.decode.offers] == [0, 2]
        assert completed.num_chunks_resent == 1
        await harness.settled()


async def test_prompt_that_fails_while_its_layers_travel_is_never_final_and_leaves_nothing() -> None:
    async with running() as harness:
        harness.ranks.is_manual = harness.ranks.holds_sends = True
        harness.ranks.token = SampledToken(-1, -1, error="logits are not finite")
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        async with asyncio.timeout(5):
            await harness.ranks.on_held.wait()
        harness.ranks.answer_step()
        with pytest.raises(errors.InternalError, match="not finite"):
            await call
        assert harness.decode.finish is None
        assert {offer.num_final_blocks for offer in harness.decode.offers} == {0}
        assert harness.worker.status().num_blocks_held == 2, "a rank may still read them"
        while harness.ranks.held:
            harness.ranks.finish_send()
        await harness.settled()


async def test_at_most_four_chunks_travel_at_once() -> None:
    async with running(num_slots=4) as harness:
        harness.decode.max_layer_blocks_per_chunk = 1
        harness.ranks.holds_sends = True
        call = asyncio.create_task(harness.prefill(harness.request(60)))
        async with asyncio.timeout(5):
            while len(harness.ranks.held) < 4:
                harness.ranks.on_held.clear()
                await harness.ranks.on_held.wait()
        assert len(harness.decode.offers) == 4
        harness.ranks.holds_sends = False
        while harness.ranks.held:
            harness.ranks.finish_send()
        await call
        assert harness.decode.max_chunks_in_flight <= 4
        assert len(harness.decode.offers) == 15 * 2
        await harness.settled()


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(1, 2), (2, 1), (2, 4), (4, 2)])
async def test_legs_are_packed_into_the_slots_of_their_ranks(prefill_tp: int, decode_tp: int) -> None:
    async with running(tp_size=prefill_tp, decode_tp=decode_tp) as harness:
        await harness.prefill(harness.request(8))
        layout = harness.worker.model.layout
        sent = [
            (rank, leg.offset, leg.num_bytes, leg.first_local_head, leg.num_heads, leg.address)
            for rank, leg in harness.ranks.sends
        ]
        num_heads = 4 // max(prefill_tp, decode_tp)
        size = layout.leg_bytes(2, layout.num_layers, num_heads)
        per_rank = max(1, decode_tp // prefill_tp)
        expected = []
        for index in range(max(prefill_tp, decode_tp)):
            place = index % per_rank
            address = f"ucx://127.0.0.1:{1 + index * decode_tp // max(prefill_tp, decode_tp)}"
            expected.append((index // per_rank, place * size, size, place * num_heads, num_heads, address))
        assert sorted(sent) == sorted(expected)
        assert set(harness.ranks.connects) == {(rank, address) for rank, *_, address in sent}
        await harness.settled()


async def test_ranks_say_what_decode_was_told_they_would() -> None:
    async with running(tp_size=2, decode_tp=2) as harness:
        await harness.prefill(harness.request(8))
        assert harness.decode.begin is not None
        told = dict(enumerate(harness.decode.begin.connection_secrets, 1))  # a rank has its number and 1 for a port
        assert len(set(told.values())) == 2
        said = {(int(message.address[-1]), message.secret) for message in harness.ranks.connect_messages}
        assert said == {(int(leg.address[-1]), leg.secret) for _, leg in harness.ranks.sends}
        assert said == set(told.items())
        await harness.settled()


async def test_chunk_is_never_larger_than_our_own_slot() -> None:
    async with running(slot_bytes=4096 + 64) as harness:
        harness.decode.max_layer_blocks_per_chunk = 100
        await harness.prefill(harness.request(60))
        largest = harness.worker.model.layout.max_layer_blocks_per_slot(4096 + 64, 4)
        assert max(offer.num_blocks * offer.num_layers for offer in harness.decode.offers) <= largest
        assert all(leg.offset + leg.num_bytes <= 4096 + 64 for _, leg in harness.ranks.sends)
        await harness.settled()


@pytest.mark.parametrize(
    "reason",
    [
        kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH,
        kv_pb2.CHUNK_REJECT_REASON_TRUNCATED,
        kv_pb2.CHUNK_REJECT_REASON_TIMEOUT,
        kv_pb2.CHUNK_REJECT_REASON_PEER_LOST,
    ],
)
async def test_rejected_chunk_is_sent_again(reason: kv_pb2.ChunkRejectReason.ValueType) -> None:
    async with running() as harness:
        harness.decode.verdicts = [reason]
        _, completed = await harness.prefill(harness.request(8))
        assert [offer.chunk_index for offer in harness.decode.offers] == [0, 0]
        assert (completed.num_chunks_resent, completed.num_blocks_shipped) == (1, 2)
        assert completed.bytes_shipped == 2 * harness.worker.model.layout.leg_bytes(2, 2, 4)
        assert len(harness.ranks.connects) == 2, "either end may have closed the connection"
        await harness.settled()


async def test_chunk_is_not_sent_again_for_ever() -> None:
    async with running(max_chunk_resends=2) as harness:
        harness.decode.verdicts = [kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH] * 10
        with pytest.raises(errors.DigestMismatch):
            await harness.prefill(harness.request(8))
        assert len(harness.decode.offers) == 3
        assert (await harness.settled()).counters["requests_failed"] == 1


async def test_deadline_passes_while_no_grant_comes() -> None:
    async with running() as harness:
        harness.decode.stage = Stage("offered")
        with pytest.raises(errors.DeadlineExceeded):
            await harness.prefill(harness.request(timeout_s=0.3))
        await harness.settled()


@pytest.mark.parametrize(("stage", "bound"), [("begin", "ACCEPT_TIMEOUT_S"), ("joined", "ANSWER_GRACE_S")])
async def test_decode_that_goes_silent_does_not_hold_a_request_until_its_deadline(
    stage: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"services.prefill.handoff.{bound}", 0.05)
    async with running() as harness:
        harness.decode.stage = Stage(stage)
        with pytest.raises(errors.TransferTimeout, match="decode did not"):
            await asyncio.wait_for(harness.prefill(harness.request(timeout_s=60.0)), 20.0)
        await harness.settled()


async def test_a_caller_whose_clock_is_first_is_late_and_not_cancelled() -> None:
    async with running() as harness:
        harness.ranks.is_manual = True
        call = harness.call(harness.request(timeout_s=0.1))
        await harness.until(lambda status: status.num_running + status.num_waiting > 0)
        call.cancel()
        await harness.until(lambda status: status.counters["requests_failed"] == 1)
        while harness.ranks.plans:
            harness.ranks.answer_step()
        assert (await harness.settled()).counters["requests_cancelled"] == 0


async def test_deadline_passes_in_the_queue() -> None:
    async with running() as harness:
        harness.ranks.is_manual = True
        with pytest.raises(errors.DeadlineExceeded):
            await harness.prefill(harness.request(timeout_s=0.2))
        while harness.ranks.plans:
            harness.ranks.answer_step()
        await harness.settled()


@pytest.mark.parametrize("stage", STAGES)
async def test_decode_dies(stage: str) -> None:
    async with running() as harness:
        harness.decode.stage = Stage(stage, "die")
        with pytest.raises(errors.PeerLost):
            await harness.prefill(harness.request())
        await harness.settled()


@pytest.mark.parametrize("stage", STAGES)
async def test_preemption_by_decode_is_passed_on_unchanged(stage: str) -> None:
    async with running() as harness:
        harness.decode.stage = Stage(stage, "preempt")
        with pytest.raises(errors.Preempted, match="blocks went to others"):
            await harness.prefill(harness.request())
        await harness.settled()


@pytest.mark.parametrize("stage", STAGES)
async def test_router_goes_away(stage: str) -> None:
    async with running() as harness:
        harness.decode.stage = Stage(stage)
        call = harness.call(harness.request())
        async with asyncio.timeout(5):
            await harness.decode.reached.wait()
        call.cancel()
        status = await harness.settled()
        await harness.until(lambda status: status.counters["requests_cancelled"] == 1)
        assert status.num_slots_quarantined == 0


async def test_router_goes_away_while_the_prompt_computes() -> None:
    async with running() as harness:
        harness.ranks.is_manual = True
        call = harness.call(harness.request(40))
        await harness.ranks.on_plan.wait()
        call.cancel()
        await harness.until(lambda status: status.num_running == 0)
        assert harness.worker.status().num_blocks_held > 0  # plans are in flight
        assert harness.ranks.rows == set() or harness.ranks.plans
        while harness.ranks.plans:
            harness.ranks.answer_step()
        await harness.settled()
        assert harness.ranks.rows == set()


async def test_router_goes_away_while_a_rank_gathers() -> None:
    async with running() as harness:
        harness.ranks.holds_sends = True
        call = harness.call(harness.request(8))
        await harness.ranks.on_held.wait()
        call.cancel()
        await harness.until(lambda status: status.num_running == 0)
        status = harness.worker.status()
        assert (status.num_blocks_held, status.num_slots_in_use) == (2, 1)
        harness.ranks.finish_send()
        await harness.settled()


@pytest.mark.parametrize("error", ["", "PeerLost"])
async def test_router_goes_away_when_decode_has_a_chunk_and_our_rank_has_not_said_so(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rank says later concerns nobody, the worker least of all."""
    verified = asyncio.Event()
    verdict = Handoff._verdict

    async def noting(self: Handoff, chunk: Chunk, deadline_s: float) -> Answer:
        answer = await verdict(self, chunk, deadline_s)
        verified.set()
        return answer

    monkeypatch.setattr(Handoff, "_verdict", noting)
    async with running() as harness:
        harness.ranks.holds_sends = True
        call = harness.call(harness.request(8))
        async with asyncio.timeout(5):
            await harness.ranks.on_held.wait()
            harness.ranks.wire.deliver(harness.ranks.held[0][0].tag)
            await verified.wait()
            call.cancel()
            await harness.until(lambda status: status.num_running == 0)
        while harness.ranks.held:
            harness.ranks.finish_send(error)
        await harness.settled()
        harness.ranks.holds_sends = False
        await harness.prefill(harness.request(8))


async def test_send_in_doubt_keeps_its_slot_until_it_is_drained() -> None:
    async with running() as harness:
        harness.ranks.holds_sends = True
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        await harness.ranks.on_held.wait()
        harness.ranks.on_held.clear()
        leg, operation = harness.ranks.finish_send("TransferTimeout", is_in_doubt=True)
        await harness.ranks.on_held.wait()
        again, _ = harness.ranks.finish_send()
        assert again.slot != leg.slot
        _, completed = await call
        assert (completed.num_chunks_resent, harness.decode.aborted) == (1, [0])
        status = await harness.until(lambda status: status.num_running == 0)
        assert (status.num_slots_quarantined, status.num_slots_free) == (1, 1)
        assert status.counters["slots_quarantined"] == 1
        assert status.num_blocks_held == 0
        drain(leg, operation)
        await harness.settled()


async def test_nothing_is_offered_before_the_ranks_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer takes a slot at decode, which a worker that is connected could use meanwhile."""
    accepted = asyncio.Event()
    receive = HandoffStream.receive

    async def noting(self: HandoffStream) -> kv_pb2.HandoffResponse:
        response = await receive(self)
        if response.HasField("accepted"):
            accepted.set()
        return response

    monkeypatch.setattr(HandoffStream, "receive", noting)
    async with running() as harness:
        harness.ranks.holds_connects = True
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        async with asyncio.timeout(5):
            await accepted.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert harness.worker.counters.num_offered == len(harness.decode.offers) == 0
        harness.ranks.finish_connects()
        await call
        assert harness.decode.offers
        await harness.settled()


@pytest.mark.parametrize("error", ["PeerLost", "TransferTimeout"])
async def test_failed_send_reconnects_and_is_offered_again(error: str) -> None:
    async with running() as harness:
        harness.ranks.holds_sends = True
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        await harness.ranks.on_held.wait()
        harness.ranks.on_held.clear()
        harness.ranks.finish_send(error)
        await harness.ranks.on_held.wait()
        harness.ranks.finish_send()
        _, completed = await call
        assert completed.num_chunks_resent == 1
        assert len(harness.ranks.connects) == 2
        await harness.settled()


async def test_chunks_wait_for_a_send_slot_in_turn() -> None:
    async with running(num_slots=1) as harness:
        harness.ranks.holds_sends = True
        calls = [asyncio.create_task(harness.prefill(harness.request(8, first_token_id=i * 10))) for i in range(3)]
        for _ in calls:
            async with asyncio.timeout(5):
                await harness.ranks.on_held.wait()
            assert len(harness.ranks.held) == 1
            harness.ranks.on_held.clear()
            harness.ranks.finish_send()
        await asyncio.gather(*calls)
        await harness.settled()


async def test_grant_that_ends_before_a_slot_is_free_is_given_back() -> None:
    async with running(num_slots=1, max_chunk_resends=0) as harness:
        harness.ranks.holds_sends = True
        holder = asyncio.create_task(harness.prefill(harness.request(8)))
        await harness.ranks.on_held.wait()
        harness.decode.grant_timeout_s = 0.1
        with pytest.raises(errors.TransferTimeout):
            await harness.prefill(harness.request(8, first_token_id=50))
        assert harness.decode.aborted == [0]
        harness.ranks.finish_send()
        await holder
        await harness.settled()


async def test_unreachable_decode_rank_fails_the_call() -> None:
    async with running() as harness:
        harness.ranks.connect_error = "PeerLost"
        with pytest.raises(errors.PeerLost):
            await harness.prefill(harness.request())
        await harness.settled()


def _other_size(grant: kv_pb2.ChunkGrant) -> None:
    grant.legs[0].num_bytes += 1


def _other_rank(grant: kv_pb2.ChunkGrant) -> None:
    grant.legs[0].prefill_rank = 9


def _leg_twice(grant: kv_pb2.ChunkGrant) -> None:
    grant.legs.add().CopyFrom(grant.legs[0])


@pytest.mark.parametrize("change", [_other_size, _other_rank, _leg_twice])
async def test_grant_with_other_legs_is_not_obeyed(change: object) -> None:
    async with running() as harness:
        harness.decode.change_grant = change  # type: ignore[assignment]
        with pytest.raises(errors.TransferError, match="other legs"):
            await harness.prefill(harness.request())
        assert harness.ranks.sends == []
        await harness.settled()


async def test_decode_that_claims_more_blocks_than_there_are_is_not_believed() -> None:
    async with running() as harness:
        harness.decode.num_blocks_reused = 7
        with pytest.raises(errors.TransferError, match="7 of 6"):
            await harness.prefill(harness.request(22))
        await harness.settled()


@pytest.mark.parametrize("ending", ["eos", "stop", "length"])
async def test_first_token_that_ends_the_output_ends_the_handoff(ending: str) -> None:
    async with running() as harness:
        request = harness.request()
        if ending == "eos":
            request.sequence.eos_token_ids.append(FIRST_TOKEN)
        elif ending == "stop":
            request.sequence.sampling.stop_token_ids.append(FIRST_TOKEN)
        else:
            request.sequence.sampling.max_tokens = 1
        harness.decode.stage = Stage("offered")
        first, completed = await harness.prefill(request)
        length = ending == "length"
        reason = sampling_pb2.FINISH_REASON_LENGTH if length else sampling_pb2.FINISH_REASON_STOP
        assert first.finish_reason == reason
        assert completed.prefill_ns > 0
        await harness.settled()
        assert harness.decode.finish is None


async def test_tokens_before_a_migration_count_towards_the_limit() -> None:
    async with running() as harness:
        request = harness.request(20)
        request.sequence.num_prompt_tokens = 15
        request.sequence.sampling.max_tokens = 6
        first, _ = await harness.prefill(request)
        assert first.finish_reason == sampling_pb2.FINISH_REASON_LENGTH


async def test_log_probabilities_are_reported() -> None:
    async with running() as harness:
        harness.ranks.token = SampledToken(-1, 5, -0.5, [(5, -0.5), (6, -1.5)])
        first, _ = await harness.prefill(harness.request())
        assert (first.logprobs.chosen.token_id, first.logprobs.chosen.logprob) == (5, -0.5)
        assert [(top.token_id, top.logprob) for top in first.logprobs.top] == [(5, -0.5), (6, -1.5)]


async def test_prompt_that_the_ranks_refuse_fails_alone() -> None:
    async with running() as harness:
        harness.ranks.token = SampledToken(-1, -1, error="not a number")
        with pytest.raises(errors.InternalError):
            await harness.prefill(harness.request())
        harness.ranks.token = SampledToken(-1, FIRST_TOKEN)
        await harness.prefill(harness.request())
        await harness.settled()


@pytest.mark.parametrize("when", ["computing", "sending"])
async def test_lost_ranks_fail_every_call_and_are_replaced(when: str) -> None:
    async with running() as harness:
        ranks = harness.ranks
        ranks.is_manual, ranks.holds_sends = when == "computing", when == "sending"
        calls = [asyncio.create_task(harness.prefill(harness.request(8, first_token_id=i))) for i in (1, 50)]
        await harness.until(lambda status: status.num_running == 2)
        await (ranks.on_plan if when == "computing" else ranks.on_held).wait()
        ranks.lose()
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, errors.Unavailable)
        status = await harness.until(lambda status: status.state == worker_pb2.WORKER_STATE_READY)
        assert harness.ranks is not ranks
        assert status.counters["ranks_lost"] == 1
        assert status.num_blocks_cached == 0
        await harness.prefill(harness.request())
        assert harness.decode.begin is not None
        assert "/2/" in harness.decode.begin.rank_peer_names[0]
        await harness.settled()


async def test_ranks_that_hang_fail_every_call_and_are_replaced() -> None:
    async with running(step_timeout_s=0.05) as harness:
        ranks = harness.ranks
        ranks.is_manual = True  # and nobody answers
        with pytest.raises(errors.Unavailable, match="hang"):
            await harness.prefill(harness.request())
        status = await harness.until(lambda status: status.state == worker_pb2.WORKER_STATE_READY)
        assert (harness.ranks is not ranks, status.counters["ranks_lost"]) == (True, 1)
        await harness.prefill(harness.request())
        await harness.settled()


async def test_full_queue_refuses_before_anything_is_computed() -> None:
    async with running(max_waiting=1, max_rows=1) as harness:
        harness.ranks.is_manual = True
        calls = [asyncio.create_task(harness.prefill(harness.request(40)))]
        await harness.ranks.on_plan.wait()
        calls.append(asyncio.create_task(harness.prefill(harness.request(40, first_token_id=50))))
        await harness.until(lambda status: status.num_waiting == 1)
        with pytest.raises(errors.ResourceExhausted) as raised:
            await harness.prefill(harness.request(8, first_token_id=70))
        assert raised.value.retry_after_s > 0
        harness.ranks.is_manual = False
        while harness.ranks.plans:
            harness.ranks.answer_step()
        await asyncio.gather(*calls)
        status = await harness.settled()
        assert status.counters["requests_refused"] == 1


async def test_worker_that_does_not_fit_is_refused() -> None:
    async with running() as harness:
        request = harness.request()
        request.ticket.layout_fingerprint = "another"
        with pytest.raises(errors.FailedPrecondition, match="another"):
            await harness.prefill(request)
        await harness.settled()


def _no_ranks(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.ClearField("rank_addresses")


def _no_address(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.ClearField("handoff_address")


def _odd_ranks(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.rank_addresses.extend(["ucx://127.0.0.1:2", "ucx://127.0.0.1:3"])


def _empty_rank(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.rank_addresses[0] = ""


def _no_url(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.rank_addresses[0] = "decode:1"


def _other_transport(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.rank_addresses[0] = "nccl://127.0.0.1:1"


def _url_without_port(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.rank_addresses[0] = "ucx://"


def _no_port(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.handoff_address = "decode"


def _long_name(request: prefill_pb2.PrefillRequest) -> None:
    request.ticket.decode_worker_id = "d" * (1 << 16)


def _no_tokens(request: prefill_pb2.PrefillRequest) -> None:
    request.sequence.ClearField("token_ids")


@pytest.mark.parametrize(
    "change",
    [
        _no_ranks,
        _no_address,
        _odd_ranks,
        _empty_rank,
        _no_url,
        _other_transport,
        _url_without_port,
        _no_port,
        _long_name,
        _no_tokens,
    ],
)
async def test_nonsense_from_a_router_is_refused(change: object) -> None:
    async with running() as harness:
        request = harness.request()
        assert callable(change)
        change(request)
        with pytest.raises(errors.InvalidArgument):
            await harness.prefill(request)
        await harness.settled()


async def test_many_ranks_are_refused_before_anything_looks_at_them() -> None:
    async with running() as harness:
        request = harness.request()
        request.ticket.rank_addresses[:] = [""] * 20_000
        with pytest.raises(errors.InvalidArgument) as caught:
            await harness.prefill(request)
        assert (caught.value.field, caught.value.value) == ("ticket.rank_addresses", "20000")
        assert caught.value.limit == "1 to 64 entries"
        await harness.settled()


async def test_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    async with running() as harness:
        harness.ranks.holds_sends = True
        call = asyncio.create_task(harness.prefill(harness.request(8)))
        await harness.ranks.on_held.wait()
        harness.worker.drain()
        with pytest.raises(errors.Unavailable):
            await harness.prefill(harness.request(8))
        idle = asyncio.create_task(harness.worker.wait_idle(5.0))
        harness.ranks.finish_send()
        await call
        assert await idle
        assert harness.worker.status().state == worker_pb2.WORKER_STATE_DRAINING


async def test_unanswered_drain_gives_up_after_its_time() -> None:
    async with running() as harness:
        harness.ranks.is_manual = True
        call = harness.call(harness.request(8))
        await harness.ranks.on_plan.wait()
        assert not await harness.worker.wait_idle(0.05)
        call.cancel()
