"""One sequence as both workers see it: checked, immutable, its deadline on this process's monotonic clock.

The router validates what clients send; the checks here keep a wrong router from bringing a worker
down. Knows protobuf, but neither gRPC nor torch nor text.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from baton.v1 import kv_pb2, sampling_pb2

from common.errors import DeadlineExceeded, InvalidArgument
from common.message_bounds import check_count
from common.sampling.limits import MAX_EOS_TOKEN_IDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from common.sampling.params import SamplingParams, validate
from common.worker.step_plan import AddRow

MAX_REQUEST_ID_CHARS = 128
MAX_TENANT_CHARS = 128
MAX_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """What the model that is served allows."""

    vocab_size: int
    context_length: int  # prompt and output together


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One output of one request. `token_ids`: the prompt, then what was generated before it came here.

    They are an `array("I")`, which nobody changes: it is hashed, cut and sent as memory, without an object for each id.
    """

    request_id: str
    sequence_id: int
    token_ids: array[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    tenant: str
    deadline_s: float  # time.monotonic() of this process

    @classmethod
    def from_proto(cls, pb: kv_pb2.Sequence, now_s: float, limits: SequenceLimits) -> SequenceRequest:
        """Raises `InvalidArgument` for a field that is wrong, `DeadlineExceeded` if no time is left."""
        _check_name("sequence.request_id", pb.request_id, MAX_REQUEST_ID_CHARS)
        if len(pb.tenant) > MAX_TENANT_CHARS:
            raise InvalidArgument("sequence.tenant", pb.tenant, f"at most {MAX_TENANT_CHARS} characters")
        check_count("sequence.token_ids", len(pb.token_ids), limits.context_length - 1)
        check_count("sequence.eos_token_ids", len(pb.eos_token_ids), MAX_EOS_TOKEN_IDS)
        check_count("sequence.sampling.stop_token_ids", len(pb.sampling.stop_token_ids), MAX_STOP_TOKEN_IDS)
        check_count("sequence.sampling.logit_bias", len(pb.sampling.logit_bias), MAX_LOGIT_BIAS)
        ids = np.array(pb.token_ids, dtype=np.uint32)  # fast: protobuf hands over its memory
        _check_tokens(ids, pb.num_prompt_tokens, limits)
        request = cls(
            request_id=pb.request_id,
            sequence_id=pb.sequence_id,
            token_ids=array("I", ids.tobytes()),
            num_prompt_tokens=pb.num_prompt_tokens,
            sampling=sampling_from_proto(pb.sampling, pb.choice, tuple(pb.eos_token_ids)),
            tenant=pb.tenant,
            deadline_s=now_s + _timeout_s(pb.timeout_ns),
        )
        validate(request.sampling, limits.vocab_size, limits.context_length - pb.num_prompt_tokens)
        if request.num_output_tokens >= request.sampling.max_tokens:
            raise InvalidArgument("sequence.token_ids", ids.size, "the output already has max_tokens tokens")
        return request

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were generated before the sequence came here."""
        return len(self.token_ids) - self.num_prompt_tokens

    def add_row(self, row: int) -> AddRow:
        """The message that gives the sequence a row on the ranks."""
        return AddRow(
            row,
            self.sampling,
            self.token_ids[: self.num_prompt_tokens].tobytes(),
            self.token_ids[self.num_prompt_tokens :].tobytes(),
        )

    def finish_reason(self, token_id: int, output_index: int) -> sampling_pb2.FinishReason.ValueType:
        """Why the output ends with this token at this index of the output; UNSPECIFIED if it goes on."""
        if token_id in self.sampling.ending_token_ids:
            return sampling_pb2.FINISH_REASON_STOP
        if output_index + 1 >= self.sampling.max_tokens:
            return sampling_pb2.FINISH_REASON_LENGTH
        return sampling_pb2.FINISH_REASON_UNSPECIFIED


def sampling_from_proto(pb: sampling_pb2.SamplingParams, choice: int, eos_token_ids: tuple[int, ...]) -> SamplingParams:
    """What the ranks get. Unset fields take the protocol's defaults; max_tokens and seed have none."""
    for name in ("max_tokens", "seed"):
        if not pb.HasField(name):
            raise InvalidArgument(f"sequence.sampling.{name}", None, "must be resolved by the router")
    return SamplingParams(
        max_tokens=pb.max_tokens,
        seed=pb.seed,
        choice=choice,
        min_tokens=pb.min_tokens,
        temperature=pb.temperature if pb.HasField("temperature") else 1.0,
        top_p=pb.top_p if pb.HasField("top_p") else 1.0,
        top_k=pb.top_k,
        min_p=pb.min_p,
        presence_penalty=pb.presence_penalty,
        frequency_penalty=pb.frequency_penalty,
        repetition_penalty=pb.repetition_penalty if pb.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(sorted(pb.logit_bias.items())),
        logprobs=pb.logprobs if pb.HasField("logprobs") else None,
        stop_token_ids=tuple(pb.stop_token_ids),
        ignore_eos=pb.ignore_eos,
        eos_token_ids=eos_token_ids,
    )


def _check_name(field: str, value: str, max_chars: int) -> None:
    if not 0 < len(value) <= max_chars or not value.isascii() or not value.isprintable():
        raise InvalidArgument(field, value, f"1 to {max_chars} printable ASCII characters")


def _check_tokens(ids: npt.NDArray[np.uint32], num_prompt_tokens: int, limits: SequenceLimits) -> None:
    if not 1 <= num_prompt_tokens <= ids.size:
        raise InvalidArgument("sequence.num_prompt_tokens", num_prompt_tokens, f"1 to {ids.size}")
    if ids.size >= limits.context_length:
        raise InvalidArgument("sequence.token_ids", ids.size, f"fewer than {limits.context_length}")
    largest = int(ids.max())
    if largest >= limits.vocab_size:
        raise InvalidArgument("sequence.token_ids", largest, f"must be below {limits.vocab_size}")


def _timeout_s(timeout_ns: int) -> float:
    if timeout_ns == 0:
        raise DeadlineExceeded("no time was left when the sequence was sent")
    if timeout_ns > MAX_TIMEOUT_S * 1e9:
        raise InvalidArgument("sequence.timeout_ns", timeout_ns, f"at most {MAX_TIMEOUT_S:.0f} s")
    return timeout_ns / 1e9
