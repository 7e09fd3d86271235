"""What a peer that keeps to the rules says to one RPC, from a seed, so that only a little is wrong. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from baton.v1 import decode_pb2, inference_pb2, kv_pb2, prefill_pb2, sampling_pb2
from google.protobuf.message import Message

NUM_BLOCK_TOKENS: Final = 64  # of a block; prompts of a few
_TIMEOUT_NS: Final = 200_000_000


def generate(rng: random.Random, ticket: kv_pb2.Ticket) -> list[Message]:
    """A request for some tokens."""
    sampling = sampling_pb2.SamplingParams(max_tokens=rng.randint(1, 40), temperature=rng.choice((0.0, 0.7)))
    request = inference_pb2.GenerateRequest(sampling=sampling, n=rng.choice((1, 1, 3)), stop=["\n\n"])
    match rng.randrange(3):
        case 0:
            request.text = "def merge(" * rng.randint(1, 30)
        case 1:
            request.token_ids.ids.extend(_tokens(rng))
        case _:
            request.chat.messages.add(role="user", content="What does heapq.merge do?")
    return [request]


def prefill(rng: random.Random, ticket: kv_pb2.Ticket) -> list[Message]:
    """A prompt whose sequence nobody has opened."""
    return [prefill_pb2.PrefillRequest(sequence=_sequence(rng), ticket=ticket)]


def session(rng: random.Random, ticket: kv_pb2.Ticket) -> list[Message]:
    """Sequences are opened, to be handed off or computed there, and mostly closed."""
    said: list[Message] = [
        decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id=f"{rng.getrandbits(128):x}"))
    ]
    for number in range(1, rng.randint(2, 4)):
        is_local = rng.random() < 0.5
        opened = decode_pb2.OpenRequest(sequence=_sequence(rng), compute_locally=is_local)
        opened.sequence.sequence_id = number
        if not is_local:
            opened.ticket_id = rng.getrandbits(64)
        said += [
            decode_pb2.SessionRequest(open=opened),
            decode_pb2.SessionRequest(beat=decode_pb2.SessionBeat(number=number)),
        ]
        if rng.random() < 0.7:
            said.append(decode_pb2.SessionRequest(close=decode_pb2.CloseRequest(sequence_id=number)))
    return said


def handoff(rng: random.Random, ticket: kv_pb2.Ticket) -> list[Message]:
    """Chunks are offered for a sequence that nobody has opened."""
    begin = kv_pb2.HandoffBegin(
        ticket_id=rng.getrandbits(64),
        prefill_worker_id="prefill-9",
        prefill_incarnation="0123456789abcdef",
        prefill_tp_size=1,
        layout_fingerprint=ticket.layout_fingerprint,
        rank_peer_names=["prefill-9/0123456789abcdef/0"],
        connection_secrets=[rng.randbytes(16) for _ in ticket.rank_addresses],
    )
    offer = kv_pb2.ChunkOffer(num_blocks=1, num_layers=2, num_final_blocks=1)
    aborted = kv_pb2.ChunkAborted(reason="it is over")
    return [
        kv_pb2.HandoffRequest(begin=begin),
        kv_pb2.HandoffRequest(chunk_offer=offer),
        kv_pb2.HandoffRequest(chunk_aborted=aborted),
        kv_pb2.HandoffRequest(finish=kv_pb2.HandoffFinish(first_token_id=5, num_blocks=1)),
    ]


Dialogue = Callable[[random.Random, kv_pb2.Ticket], list[Message]]
DIALOGUES: Final[dict[str, Dialogue]] = {
    "/baton.v1.Inference/Generate": generate,
    "/baton.v1.Prefill/Prefill": prefill,
    "/baton.v1.Decode/Session": session,
    "/baton.v1.Decode/Handoff": handoff,
}


def _sequence(rng: random.Random) -> kv_pb2.Sequence:
    tokens = _tokens(rng)
    return kv_pb2.Sequence(
        request_id="fuzz",
        sequence_id=rng.getrandbits(32),
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=sampling_pb2.SamplingParams(
            max_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=rng.getrandbits(64)
        ),
        timeout_ns=_TIMEOUT_NS,
    )


def _tokens(rng: random.Random) -> list[int]:
    return [rng.randrange(300) for _ in range(rng.choice((1, NUM_BLOCK_TOKENS, 2 * NUM_BLOCK_TOKENS + 3)))]
