"""What clients may ask for, through real processes: sampling, several outputs, text, chat, stop strings, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from baton.v1 import inference_pb2, sampling_pb2

from cli.client import Client
from cli.deployment import DeploymentSpec
from common.errors import InvalidArgument, NotFound
from tests.integration.deployments import deployed
from tests.integration.reference import Reference
from tests.integration.requests import ask, ask_all

FLOAT32 = ("--dtype", "float32")


async def test_requests_of_every_kind(shipped_model: Path, shipped_reference: Reference) -> None:
    spec = DeploymentSpec(
        model=shipped_model,
        num_prefill=2,
        decode_tp=2,
        router_processes=2,
        prefill_args=FLOAT32,
        decode_args=(*FLOAT32, "--num-blocks", "48"),
    )
    async with deployed(spec) as (deployment, client):
        await _seeded_draws_are_the_same_in_any_company(client, shipped_reference)
        await _outputs_of_one_request_differ_and_repeat(client)
        await _text_chat_and_stop_strings(client)
        await _bad_requests_are_refused_by_name(client)
        status = await deployment.status(deployment.decode[0])
        assert status.counters["preemptions"] > 0, "the pool was large enough: no draw was interrupted"


def _sampled(prompt: list[int], seed: int, num_tokens: int = 40) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(
            temperature=0.9,
            top_p=0.95,
            top_k=200,
            seed=seed,
            max_tokens=num_tokens,
            ignore_eos=True,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
        ),
    )


async def _seeded_draws_are_the_same_in_any_company(client: Client, reference: Reference) -> None:
    """Alone, and among requests that fill the decode pool until sequences are preempted and replayed."""
    prompts = reference.prompts((100, 64, 30), seed=61)
    alone = [await ask(client, _sampled(prompt, seed=1000 + i)) for i, prompt in enumerate(prompts)]
    crowd = [_sampled(prompt, seed=7, num_tokens=150) for prompt in reference.prompts((120,) * 24, seed=62)]
    together = await ask_all(client, [_sampled(p, seed=1000 + i) for i, p in enumerate(prompts)] + crowd)
    assert [answer.tokens for answer in together[:3]] == [answer.tokens for answer in alone]
    assert all(len(answer.tokens) == 150 for answer in together[3:])


async def _outputs_of_one_request_differ_and_repeat(client: Client) -> None:
    request = inference_pb2.GenerateRequest(
        text="import ", n=3, sampling=sampling_pb2.SamplingParams(temperature=1.0, seed=5, max_tokens=12)
    )
    first, second = await ask(client, request), await ask(client, request)
    assert sorted(first.token_ids) == [0, 1, 2]
    assert len({tuple(tokens) for tokens in first.token_ids.values()}) == 3
    assert first.token_ids == second.token_ids
    assert first.seed == 5


async def _text_chat_and_stop_strings(client: Client) -> None:
    chat = inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role="user", content="What does heapq.merge do?")]
    )
    greedy = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=40)
    answer = await ask(client, inference_pb2.GenerateRequest(chat=chat, sampling=greedy))
    assert answer.text[0].startswith("Merge multiple sorted inputs into a single sorted output.")
    stopped = await ask(client, inference_pb2.GenerateRequest(chat=chat, sampling=greedy, stop=["sorted inp"]))
    assert stopped.text[0] == "Merge multiple "
    assert stopped.finish_reason == sampling_pb2.FINISH_REASON_STOP
    biased = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=5, logit_bias={77: 100.0})
    assert (await ask(client, inference_pb2.GenerateRequest(text="x", sampling=biased))).tokens == [77] * 5


async def _bad_requests_are_refused_by_name(client: Client) -> None:
    info = await client.model_info()
    too_long = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * info.context_length))
    with pytest.raises(InvalidArgument, match="token_ids"):
        await ask(client, too_long)
    not_a_number = sampling_pb2.SamplingParams(temperature=float("nan"))
    with pytest.raises(InvalidArgument, match=r"sampling\.temperature"):
        await ask(client, inference_pb2.GenerateRequest(text="x", sampling=not_a_number))
    with pytest.raises(NotFound, match="another"):
        await ask(client, inference_pb2.GenerateRequest(text="x", model="another"))
