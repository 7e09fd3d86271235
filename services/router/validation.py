"""Checks of a request at the edge: what passes here is good for everybody behind. Pure.

`validate` sees the request alone; `resolve_sampling` runs when the prompt's tokens are counted. Both raise
`InvalidArgument` naming field, value and limit, `NotFound` for another model, or `ModelError` for chats that its
broken template cannot render. Nothing has reached a worker by then.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from baton.v1 import inference_pb2, sampling_pb2

from common.errors import InvalidArgument, ModelError, NotFound
from common.sampling import params
from common.sampling.limits import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from services.router.generation_config import NO_DEFAULTS, SamplingDefaults
from services.router.stop_strings import MAX_STOP_STRINGS, validate_stop_strings

MAX_TENANT_CHARS = 128
MAX_REQUEST_ID_CHARS = 128
MAX_ROLE_CHARS = 64
# No tokenizer in use makes fewer tokens of a text than this; spares encoding what cannot fit anyway.
MAX_CHARS_PER_TOKEN = 128
OTHER_FIELDS_BYTES = 256 << 10  # of all of a request but its prompt, at most


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model allows."""

    name: str
    context_length: int  # tokens, prompt and output together
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    max_message_bytes: int
    chat_template_fault: str = ""  # why the chat template that there is cannot be used
    defaults: SamplingDefaults = NO_DEFAULTS
    special_tokens: Mapping[str, int] = field(default_factory=dict)  # those that the model can draw, with their ids

    def with_context(self, context_length: int) -> ModelLimits:
        """The same with another context length: that of a deployment whose KV caches hold less than the model could."""
        return replace(self, context_length=context_length)


@dataclass(frozen=True, slots=True)
class ValidatedRequest:
    """A request within its limits. Exactly one of text, token_ids and chat is set."""

    request_id: str
    text: str | None
    token_ids: Sequence[int] | None  # the message's own: protobuf copies it into the next message as memory
    chat: tuple[tuple[str, str], ...] | None  # (role, content), oldest first
    add_generation_prompt: bool
    sampling: sampling_pb2.SamplingParams  # as the client sent it, within bounds
    seed: int
    n: int
    stop: tuple[str, ...]
    tenant: str
    include_stop_in_output: bool


def longest_request_bytes(context_length: int) -> int:
    """What a request that the model can take needs as a message, at most: memory for a larger one would be wasted."""
    return context_length * (MAX_CHARS_PER_TOKEN + MAX_ROLE_CHARS) + OTHER_FIELDS_BYTES


def validate(request: inference_pb2.GenerateRequest, limits: ModelLimits) -> ValidatedRequest:
    """The request as a value, or the first field that is out of bounds."""
    if (num_bytes := request.ByteSize()) > limits.max_message_bytes:
        raise InvalidArgument("request", f"{num_bytes} bytes", f"at most {limits.max_message_bytes} bytes")
    if request.HasField("model") and request.model != limits.name:
        raise NotFound(f"model {_short(request.model)!r} is not served here, {limits.name!r} is")
    n = request.n if request.HasField("n") else 1
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidArgument("n", n, f"1 to {MAX_CHOICES}")
    if len(request.tenant) > MAX_TENANT_CHARS:
        raise InvalidArgument("tenant", request.tenant, f"at most {MAX_TENANT_CHARS} characters")
    _check_counts(request)
    validate_stop_strings(tuple(request.stop))
    _check_prompt(request, limits)
    seed = request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(64)
    _check_sampling(request.sampling, limits, seed, limits.context_length - 1)
    kind = request.WhichOneof("prompt")
    chat = request.chat
    return ValidatedRequest(
        request_id=_request_id(request),
        text=request.text if kind == "text" else None,
        token_ids=request.token_ids.ids if kind == "token_ids" else None,
        chat=tuple((m.role, m.content) for m in chat.messages) if kind == "chat" else None,
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        sampling=_own(request.sampling),
        seed=seed,
        n=n,
        stop=tuple(request.stop),
        tenant=request.tenant,
        include_stop_in_output=request.include_stop_in_output,
    )


def resolve_sampling(
    request: ValidatedRequest, num_prompt_tokens: int, limits: ModelLimits
) -> sampling_pb2.SamplingParams:
    """The sampling parameters with every field set, as workers want them."""
    room = limits.context_length - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidArgument(_prompt_field(request), "", "the prompt has no tokens")
    if room < 1:
        limit = f"at most {limits.context_length - 1} tokens (context length {limits.context_length})"
        raise InvalidArgument(_prompt_field(request), f"{num_prompt_tokens} tokens", limit)
    given, defaults = request.sampling, limits.defaults
    if given.HasField("max_tokens"):
        max_tokens = given.max_tokens
    else:
        max_tokens = max(defaults.max_tokens(num_prompt_tokens, room), min(given.min_tokens, room))
    if max_tokens > room:
        limit = f"1 to {room} (context length {limits.context_length} - {num_prompt_tokens} prompt tokens)"
        raise InvalidArgument("sampling.max_tokens", max_tokens, limit)
    if given.min_tokens > max_tokens:
        raise InvalidArgument("sampling.min_tokens", given.min_tokens, f"0 to {max_tokens} (max_tokens)")
    min_tokens = (
        given.min_tokens if given.HasField("min_tokens") else defaults.min_tokens(num_prompt_tokens, max_tokens)
    )
    return sampling_pb2.SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=given.temperature if given.HasField("temperature") else defaults.temperature,
        top_p=given.top_p if given.HasField("top_p") else defaults.top_p,
        top_k=given.top_k if given.HasField("top_k") else defaults.top_k,
        min_p=given.min_p if given.HasField("min_p") else defaults.min_p,
        seed=request.seed,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        repetition_penalty=(
            given.repetition_penalty if given.HasField("repetition_penalty") else defaults.repetition_penalty
        ),
        logit_bias=given.logit_bias,
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        stop_token_ids=_stop_token_ids(request, limits),
        ignore_eos=given.ignore_eos,
    )


def _own(sampling: sampling_pb2.SamplingParams) -> sampling_pb2.SamplingParams:
    """A part of a message keeps all of it in memory; a copy does not."""
    copy = sampling_pb2.SamplingParams()
    copy.CopyFrom(sampling)
    return copy


def _stop_token_ids(request: ValidatedRequest, limits: ModelLimits) -> list[int]:
    """With the stop strings that are a special token: no text shows it, so that only its id can be found."""
    ids = list(request.sampling.stop_token_ids)
    named = [limits.special_tokens[stop] for stop in request.stop if stop in limits.special_tokens]
    ids += [token_id for token_id in dict.fromkeys(named) if token_id not in ids]
    if len(ids) > MAX_STOP_TOKEN_IDS:
        limit = f"stop strings that are special tokens and stop_token_ids are at most {MAX_STOP_TOKEN_IDS} together"
        raise InvalidArgument("stop", len(ids), limit)
    return ids


def within(parent: str, error: InvalidArgument) -> InvalidArgument:
    """The same error for a field that is part of another."""
    return InvalidArgument(f"{parent}.{error.field}", Shown(error.value), error.limit)


def _check_counts(request: inference_pb2.GenerateRequest) -> None:
    """Before anything is made of each entry: a message may hold millions, and everybody waits meanwhile."""
    sampling = request.sampling
    for name, num_entries, most in (
        ("stop", len(request.stop), MAX_STOP_STRINGS),
        ("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS),
        ("sampling.stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS),
    ):
        if num_entries > most:
            raise InvalidArgument(name, num_entries, f"at most {most} entries")


def _check_sampling(given: sampling_pb2.SamplingParams, limits: ModelLimits, seed: int, longest_output: int) -> None:
    sampling = params.SamplingParams(
        max_tokens=given.max_tokens if given.HasField("max_tokens") else max(1, longest_output),
        seed=seed,
        min_tokens=given.min_tokens,
        temperature=given.temperature if given.HasField("temperature") else 1.0,
        top_p=given.top_p if given.HasField("top_p") else 1.0,
        top_k=given.top_k,
        min_p=given.min_p,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(given.logit_bias.items()),
        logprobs=given.logprobs if given.HasField("logprobs") else None,
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
    )
    try:
        params.validate(sampling, limits.vocab_size, max(1, longest_output))
    except InvalidArgument as error:
        raise within("sampling", error) from error


def _check_prompt(request: inference_pb2.GenerateRequest, limits: ModelLimits) -> None:
    kind = request.WhichOneof("prompt")
    max_chars = limits.context_length * MAX_CHARS_PER_TOKEN
    if kind == "text":
        if not 1 <= len(request.text) <= max_chars:
            raise InvalidArgument("text", _short(request.text), f"1 to {max_chars} characters")
    elif kind == "token_ids":
        _check_token_ids(request.token_ids.ids, limits)
    elif kind == "chat":
        _check_chat(request.chat, limits, max_chars)
    else:
        raise InvalidArgument("prompt", None, "one of text, token_ids and chat must be set")


def _check_token_ids(ids: Sequence[int], limits: ModelLimits) -> None:
    longest = limits.context_length - 1
    if not 1 <= len(ids) <= longest:
        limit = f"1 to {longest} tokens (context length {limits.context_length})"
        raise InvalidArgument("token_ids.ids", f"{len(ids)} tokens", limit)
    if max(ids[:]) >= limits.vocab_size:  # a slice is a list, made faster than protobuf iterates
        index = next(i for i, token_id in enumerate(ids) if token_id >= limits.vocab_size)
        raise InvalidArgument(f"token_ids.ids[{index}]", ids[index], f"0 to {limits.vocab_size - 1}")


def _check_chat(chat: inference_pb2.ChatMessages, limits: ModelLimits, max_chars: int) -> None:
    if limits.chat_template_fault:
        raise ModelError(f"the checkpoint's chat template is broken: {limits.chat_template_fault}")
    if not limits.has_chat_template:
        raise InvalidArgument("chat", f"{len(chat.messages)} messages", "the checkpoint has no chat template")
    if not 1 <= len(chat.messages) <= limits.context_length:
        limit = f"1 to {limits.context_length} messages"
        raise InvalidArgument("chat.messages", f"{len(chat.messages)} messages", limit)
    num_chars = 0
    for index, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= MAX_ROLE_CHARS:
            raise InvalidArgument(f"chat.messages[{index}].role", message.role, f"1 to {MAX_ROLE_CHARS} characters")
        num_chars += len(message.content)
    if num_chars > max_chars:
        raise InvalidArgument("chat.messages", f"{num_chars} characters", f"at most {max_chars} characters in all")


def _request_id(request: inference_pb2.GenerateRequest) -> str:
    if not request.HasField("request_id"):
        return secrets.token_hex(8)
    name = request.request_id
    if not (1 <= len(name) <= MAX_REQUEST_ID_CHARS and name.isascii() and name.isprintable()):
        raise InvalidArgument("request_id", name, f"1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters")
    return name


def _prompt_field(request: ValidatedRequest) -> str:
    if request.text is not None:
        return "text"
    return "chat" if request.chat is not None else "token_ids.ids"


def _short(text: str) -> str:
    return text if len(text) <= 64 else f"{text[:61]}..."


class Shown:
    """A value that is a repr already."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
