"""A server with OpenAI's completions interface as a target: POST /v1/completions, streamed as server-sent events.

Prompts go as lists of token ids. `ignore_eos`, `min_tokens` and `continuous_usage_stats` are vLLM's extensions; where a
server does not count the tokens of a message, a message that carries text counts as one token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

import aiohttp
import msgspec

from common.errors import (
    BatonError,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from loadtest.targets.base import TIMEOUT_TO_DESCRIBE_S, Account, ModelInfo, Target, TargetSpec
from loadtest.targets.sse import EventSplitter

_MAX_SHOWN_CHARS = 300
_DONE = b"[DONE]"
_ERRORS: dict[int, type[BatonError]] = {
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.REQUEST_TIMEOUT: DeadlineExceeded,
    HTTPStatus.TOO_MANY_REQUESTS: ResourceExhausted,
    HTTPStatus.BAD_GATEWAY: Unavailable,
    HTTPStatus.SERVICE_UNAVAILABLE: Unavailable,
    HTTPStatus.GATEWAY_TIMEOUT: DeadlineExceeded,
}


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None  # vLLM's


class _Models(msgspec.Struct):
    data: list[_Model]


class _Choice(msgspec.Struct):
    text: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class OpenAITarget(Target):
    """A session with one server. `model` is known once `describe` has run."""

    def __init__(self, session: aiohttp.ClientSession, spec: TargetSpec) -> None:
        self._session = session
        self._url = spec.address.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = spec.model
        self._vocab_size = spec.vocab_size

    async def describe(self) -> ModelInfo:
        """The model asked for, or the first that the server lists."""
        try:
            async with asyncio.timeout(TIMEOUT_TO_DESCRIBE_S), self._session.get(f"{self._url}/models") as response:
                await _raise_for_status(response)
                models = msgspec.json.decode(await response.read(), type=_Models).data
        except TimeoutError as error:
            raise Unavailable(f"{self._url}: no answer in {TIMEOUT_TO_DESCRIBE_S:g} s") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise Unavailable(f"{self._url}: {error}") from error
        except msgspec.MsgspecError as error:
            raise FailedPrecondition(f"{self._url}/models is not a list of models: {error}") from error
        model = next((model for model in models if self._model in ("", model.id)), None)
        if model is None:
            raise NotFound(f"{self._url} serves {[model.id for model in models]}, not {self._model!r}")
        self._model = model.id
        return ModelInfo(model.id, self._vocab_size, model.max_model_len)

    def prepare(self, request_id: str, token_ids: list[int], max_tokens: int) -> bytes:
        """The JSON body. The interface takes no request id."""
        return msgspec.json.encode(
            {
                "model": self._model,
                "prompt": token_ids,
                "max_tokens": max_tokens,
                "min_tokens": max_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        )

    async def generate(self, body: bytes, timeout_s: float, on_tokens: Callable[[int], None]) -> Account:
        """One streamed completion. The server is told no deadline; leaving the stream cancels the request."""
        output = _Output(on_tokens)
        events = EventSplitter()
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(f"{self._url}/completions", data=body, headers=headers) as response:
                await _raise_for_status(response)
                while data := await response.content.readany():
                    if output.take(events.feed(data)):
                        return output.account()
        except aiohttp.ClientError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        raise Unavailable("the stream ended before [DONE]")


class _Output:
    """Counts the tokens of one stream."""

    def __init__(self, on_tokens: Callable[[int], None]) -> None:
        self._on_tokens = on_tokens
        self._num_tokens = 0
        self._num_cached = 0

    def take(self, events: list[bytes]) -> bool:
        """Count what came together as one arrival. Returns whether the stream is complete."""
        num_before, is_done = self._num_tokens, False
        for event in events:
            if event == _DONE:
                is_done = True
                break
            self._count(event)
        if self._num_tokens > num_before:
            self._on_tokens(self._num_tokens - num_before)
        return is_done

    def account(self) -> Account:
        return Account(num_cached_tokens=self._num_cached)

    def _count(self, event: bytes) -> None:
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError as error:
            raise InternalError(f"an event that is no completion: {event[:_MAX_SHOWN_CHARS]!r}: {error}") from error
        if chunk.error is not None:
            raise InternalError(bytes(chunk.error)[:_MAX_SHOWN_CHARS].decode(errors="replace"))
        if chunk.usage is not None:
            # Counts from the start, so it also corrects what was counted by messages.
            self._num_tokens = max(self._num_tokens, chunk.usage.completion_tokens)
            if chunk.usage.prompt_tokens_details is not None:
                self._num_cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        elif any(choice.text for choice in chunk.choices):
            self._num_tokens += 1


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status == HTTPStatus.OK:
        return
    message = f"HTTP {response.status}: {(await response.text(errors='replace'))[:_MAX_SHOWN_CHARS]}"
    error_class = _ERRORS.get(response.status)
    if error_class is not None:
        raise error_class(message)
    if HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise InvalidArgument("request", f"HTTP {response.status}", message)
    raise InternalError(message)


@asynccontextmanager
async def open_openai(spec: TargetSpec) -> AsyncIterator[OpenAITarget]:
    """A session without limits of its own: neither on connections nor on time."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 20) as session:
        yield OpenAITarget(session, spec)
