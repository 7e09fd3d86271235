"""Hold a conversation with the model behind a running router."""

from __future__ import annotations

import argparse
import asyncio

from baton.v1 import inference_pb2

from cli.client import add_connection_arguments, add_sampling_arguments, connect, sampling_from
from cli.generate import stream_to_stdout
from common.errors import FailedPrecondition, InvalidArgument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton chat`."""
    parser.add_argument("--system", help="system message that opens the conversation")
    add_sampling_arguments(parser)
    add_connection_arguments(parser)


async def run(args: argparse.Namespace) -> int:
    """Run `baton chat` until the end of standard input."""
    messages: list[inference_pb2.ChatMessage] = []
    if args.system is not None:
        messages.append(inference_pb2.ChatMessage(role="system", content=args.system))
    async with connect(args.address) as client:
        info = await client.model_info()
        if not info.has_chat_template:
            raise FailedPrecondition(f"{info.model} has no chat template; use `baton generate`")
        print(f"{info.model}, {info.context_length} tokens of context; end with Ctrl-D")
        while (line := await _read_line()) is not None:
            if not line.strip():
                continue
            messages.append(inference_pb2.ChatMessage(role="user", content=line))
            request = inference_pb2.GenerateRequest(
                chat=inference_pb2.ChatMessages(messages=messages), sampling=sampling_from(args)
            )
            try:
                answer = await stream_to_stdout(client, request, args.timeout, stats=False)
            except InvalidArgument as error:
                print(f"not sent: {error}")
                messages.pop()
                continue
            messages.append(inference_pb2.ChatMessage(role="assistant", content=answer))
    return 0


async def _read_line() -> str | None:
    try:
        return await asyncio.to_thread(input, "> ")
    except EOFError:
        return None
