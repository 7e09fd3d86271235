"""The Inference service: each call is validated, admitted, tokenised and dispatched here, in this order.

The handler's own task dispatches; the writer to the client and all else about the call are its children and end
with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

from common.deadline import Deadline
from common.errors import Cancelled, DeadlineExceeded
from common.rpc.lateness import late_not_cancelled
from common.telemetry.tracing import Tracing
from services.router.admission import Admission, Places
from services.router.attempt import RequestPlan
from services.router.choice import Choice, ChoiceLimits
from services.router.dispatcher import Dispatcher
from services.router.metrics import RouterMetrics
from services.router.output_stream import OutputStream
from services.router.placement import UNLIMITED
from services.router.request_record import RequestRecord
from services.router.served_model import ServedModel
from services.router.validation import ModelLimits, ValidatedRequest, resolve_sampling, validate
from services.router.worker_list import Role
from services.router.workers import WorkerRegistry

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

WRITE_GRACE_S = 0.5  # for a message under way when the request fails; a client that does not read gets no status


async def _write(output: OutputStream, context: _Context, received_ns: int, stall_timeout_s: float) -> None:
    async def write_in_time(response: inference_pb2.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(stall_timeout_s):
                await context.write(response)
        except TimeoutError as error:
            raise Cancelled(f"the client has read nothing for {stall_timeout_s:g} s") from error

    try:
        await output.write_to(write_in_time, received_ns)
    except grpc.aio.BaseError as error:
        raise Cancelled("the client went away") from error


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """What clients call."""

    def __init__(
        self,
        model: ServedModel,
        admission: Admission,
        dispatcher: Dispatcher,
        registry: WorkerRegistry,
        metrics: RouterMetrics,
        max_timeout_s: float,
        client_stall_timeout_s: float,
        tracing: Tracing,
    ) -> None:
        self._model = model
        self._admission = admission
        self._dispatcher = dispatcher
        self._registry = registry
        self._metrics = metrics
        self._max_timeout_s = max_timeout_s
        self._client_stall_timeout_s = client_stall_timeout_s
        self._tracing = tracing

    @property
    def _limits(self) -> ModelLimits:
        """The model's, and no more context than the KV caches of some pair of workers hold."""
        limits, capacity = self._model.limits, max(self._dispatcher.capacities, default=UNLIMITED)
        return limits if capacity >= limits.context_length else limits.with_context(capacity)

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: _Context
    ) -> inference_pb2.GetModelInfoResponse:
        limits = self._limits
        return inference_pb2.GetModelInfoResponse(
            model=limits.name,
            context_length=limits.context_length,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            has_chat_template=limits.has_chat_template,
            block_size=self._registry.block_size,
            num_prefill_workers=len(self._registry.candidates(Role.PREFILL)),
            num_decode_workers=len(self._registry.candidates(Role.DECODE)),
            is_serving=self._dispatcher.has_place,
        )

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> None:
        with self._recorded(context) as record:
            validated = validate(request, self._limits)
            del request  # a message takes many times its size, and the call may wait long
            record.request_id = validated.request_id
            deadline = Deadline.of_call(context.time_remaining(), self._max_timeout_s, time.monotonic())
            if deadline.timeout_s <= 0:
                raise DeadlineExceeded("the request's deadline had passed when it came")
            max_tokens = validated.sampling.max_tokens if validated.sampling.HasField("max_tokens") else None
            outlook = self._dispatcher.outlook(max_tokens, deadline.timeout_s)
            with late_not_cancelled(deadline):
                try:
                    async with (
                        asyncio.timeout_at(deadline.at_s),
                        self._admission.places(validated.n, outlook) as places,
                    ):
                        await self._generate(validated, context, record, deadline.at_s, places)
                except TimeoutError as error:
                    raise DeadlineExceeded(f"not done within {deadline.timeout_s:.3f} s") from error

    async def _generate(
        self,
        request: ValidatedRequest,
        context: _Context,
        record: RequestRecord,
        deadline_s: float,
        places: Places,
    ) -> None:
        admitted_ns = time.monotonic_ns()
        record.admitted(admitted_ns)
        prompt_ids = await self._model.prompt_ids(request)
        record.tokenized(admitted_ns, time.monotonic_ns(), len(prompt_ids))
        sampling = await self._resolved(request, len(prompt_ids))
        plan = RequestPlan(
            request_id=request.request_id,
            prompt_ids=prompt_ids,
            sampling=sampling,
            tenant=request.tenant,
            eos_token_ids=() if sampling.ignore_eos else self._model.limits.eos_token_ids,
            deadline_s=deadline_s,
            record=record,
        )
        gaps = self._metrics.inter_token
        output = OutputStream(request.request_id, request.seed, len(prompt_ids), time.monotonic_ns, gaps, sampling)
        output.choices = self._choices(request, sampling, output)
        for choice in output.choices:
            choice.lifetime.queue_ns = admitted_ns - record.received_ns
        record.output = output
        async with asyncio.TaskGroup() as call:
            writing = call.create_task(_write(output, context, record.received_ns, self._client_stall_timeout_s))
            try:
                await self._dispatcher.run(plan, output.choices)
                places.complete()
            except BaseException:
                # A write that is abandoned leaves gRPC unable to send a status, and the client would hear nothing.
                output.cut_off()
                await asyncio.wait((writing,), timeout=WRITE_GRACE_S)
                raise

    async def _resolved(self, request: ValidatedRequest, num_prompt_tokens: int) -> sampling_pb2.SamplingParams:
        """Within what the workers hold, which is not known while there are none: then this waits for some."""
        sampling = self._resolved_now(request, num_prompt_tokens)
        if self._dispatcher.has_place:
            return sampling
        await self._dispatcher.wait_for_place()
        return self._resolved_now(request, num_prompt_tokens)

    def _resolved_now(self, request: ValidatedRequest, num_prompt_tokens: int) -> sampling_pb2.SamplingParams:
        sampling = resolve_sampling(request, num_prompt_tokens, self._limits)
        if not request.sampling.HasField("max_tokens"):
            # As much as every pair with room holds: whichever is there must be able to take the sequence over.
            needed = num_prompt_tokens + max(1, sampling.min_tokens)
            rooms = [capacity - num_prompt_tokens for capacity in self._dispatcher.capacities if capacity >= needed]
            sampling.max_tokens = min([sampling.max_tokens, *rooms])
        return sampling

    def _choices(
        self, request: ValidatedRequest, sampling: sampling_pb2.SamplingParams, output: OutputStream
    ) -> list[Choice]:
        eos_token_ids = () if sampling.ignore_eos else self._model.limits.eos_token_ids
        limits = ChoiceLimits(
            max_tokens=sampling.max_tokens,
            ending_token_ids=frozenset((*eos_token_ids, *sampling.stop_token_ids)),
            stop=request.stop,
            include_stop_in_output=request.include_stop_in_output,
            continues_text=request.chat is None,
        )
        tokenizer = self._model.tokenizer
        return [Choice(index, limits, tokenizer, output.on_change) for index in range(request.n)]

    @contextlib.contextmanager
    def _recorded(self, context: _Context) -> Iterator[RequestRecord]:
        received_ns = time.monotonic_ns()
        record = RequestRecord(self._metrics, received_ns, self._tracing.begin("request", context, received_ns))
        try:
            yield record
        except BaseException as error:
            record.finish(error)
            raise
        record.finish(None)
