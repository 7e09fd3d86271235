"""What came back for one request: gathered, and its text printed as it comes. Knows no flags."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.v1 import inference_pb2, sampling_pb2

from cli.client import Client


@dataclass(slots=True)
class Choice:
    """One output, as far as it has come."""

    pieces: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[inference_pb2.OutputLogprobs] = field(default_factory=list)
    finish_reason: int = sampling_pb2.FINISH_REASON_UNSPECIFIED
    lifetime: inference_pb2.Lifetime = field(default_factory=inference_pb2.Lifetime)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Answer:
    """All outputs of a request. `usage` has come when the last has ended."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)

    @property
    def only(self) -> Choice:
        """The one choice that was asked for."""
        return self.choices.setdefault(0, Choice())

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """A message of the stream."""
        choice = self.choices.setdefault(response.choice, Choice())
        choice.pieces.append(response.text_delta)
        choice.num_tokens += len(response.token_ids)
        choice.logprobs.extend(response.logprobs)
        if response.finish_reason:
            choice.finish_reason = response.finish_reason
        if response.HasField("lifetime"):
            choice.lifetime = response.lifetime
        if response.HasField("usage"):
            self.usage = response.usage


async def stream_to_stdout(
    client: Client, request: inference_pb2.GenerateRequest, timeout_s: float | None, answer: Answer
) -> None:
    """Print the only choice's text as it comes. `answer` holds what had come, also if this raises or is cancelled."""
    try:
        async for response in client.generate(request, timeout_s):
            answer.add(response)
            print(response.text_delta, end="", flush=True)
    finally:
        if answer.choices:
            print(flush=True)  # what follows begins a line, be it an error


async def gather(
    client: Client, request: inference_pb2.GenerateRequest, timeout_s: float | None, answer: Answer
) -> None:
    """Print nothing: several outputs come mixed."""
    async for response in client.generate(request, timeout_s):
        answer.add(response)
