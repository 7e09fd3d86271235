"""Requests as the integration tests send them, and what came back, collected."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.v1 import inference_pb2, sampling_pb2

from cli.client import Client


@dataclass(slots=True)
class Answer:
    """Everything that one request streamed back."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)  # by choice
    text: dict[int, str] = field(default_factory=dict)
    logprobs: list[inference_pb2.OutputLogprobs] = field(default_factory=list)
    finish_reason: int = 0
    lifetime: inference_pb2.Lifetime = field(default_factory=inference_pb2.Lifetime)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    seed: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.token_ids.get(0, [])


def greedy_request(prompt: list[int], num_tokens: int, logprobs: int | None = None) -> inference_pb2.GenerateRequest:
    """Exactly `num_tokens` greedy tokens after a prompt of token ids."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs
        ),
    )


async def ask(client: Client, request: inference_pb2.GenerateRequest, timeout_s: float = 60.0) -> Answer:
    """Send one request and collect the stream."""
    answer = Answer()
    async for response in client.generate(request, timeout_s):
        answer.token_ids.setdefault(response.choice, []).extend(response.token_ids)
        answer.text[response.choice] = answer.text.get(response.choice, "") + response.text_delta
        answer.logprobs.extend(response.logprobs)
        if response.HasField("seed"):
            answer.seed = response.seed
        if response.HasField("lifetime"):
            answer.lifetime = response.lifetime
            answer.finish_reason = response.finish_reason
        if response.HasField("usage"):
            answer.usage = response.usage
    return answer


async def ask_all(
    client: Client, requests: list[inference_pb2.GenerateRequest], timeout_s: float = 120.0
) -> list[Answer]:
    """Send all requests at once."""
    return await asyncio.gather(*(ask(client, request, timeout_s) for request in requests))
