"""Hold a conversation with the model behind a running router.

Ctrl-C ends an answer and keeps what has come of it; at the prompt it leaves, as Ctrl-D and /exit do. Lines are read in
the main thread, where the signal finds them: meanwhile the loop stands still, and there is nothing for it to do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal

from baton.v1 import inference_pb2, sampling_pb2

from cli.answer import Answer, stream_to_stdout
from cli.client import Client, add_connection_arguments, add_sampling_arguments, connect, sampling_from
from common.errors import BatonError, FailedPrecondition, InvalidArgument

with contextlib.suppress(ImportError):  # some builds of Python have none: then lines are edited as the terminal does it
    import readline  # noqa: F401 - importing it gives `input` line editing and a history

PROMPT = "> "
HELP = """\
/clear  forget the conversation, and keep the system message
/exit   leave, as Ctrl-D does, and Ctrl-C at the prompt
/help   this list
Ctrl-C in an answer ends the answer; up and down bring earlier lines back."""
# Fields that a conversation outgrows: its tokens, the room for an answer, its characters.
_OUTGROWN = ("chat", "sampling.max_tokens", "chat.messages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton chat`."""
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    add_sampling_arguments(parser)
    add_connection_arguments(parser)


async def run(args: argparse.Namespace) -> int:
    """Run `baton chat` until the end of standard input."""
    async with connect(args.address) as client:
        info = await client.model_info()
        if not info.has_chat_template:
            raise FailedPrecondition(f"{info.model} has no chat template; use `baton generate`")
        print(f"{info.model}, {info.context_length} tokens of context; /help says what else there is")
        conversation = Conversation(client, args, info.context_length)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            while (line := _read_line()) is not None:
                if line == "/exit":
                    return 0
                await conversation.take(line)
        print()  # the terminal shows ^C or nothing
    return 0


class Conversation:
    """The messages so far, oldest first."""

    def __init__(self, client: Client, args: argparse.Namespace, context_length: int) -> None:
        self._client = client
        self._sampling = sampling_from(args)
        self._timeout_s: float = args.timeout
        self._context_length = context_length
        system = [] if args.system is None else [inference_pb2.ChatMessage(role="system", content=args.system)]
        self._opening: list[inference_pb2.ChatMessage] = system
        self._messages = list(system)

    async def take(self, line: str) -> None:
        """A line that was typed: a command, or what is said next."""
        if line == "/help":
            print(HELP)
        elif line == "/clear":
            self._messages = list(self._opening)
            print("forgotten; the next line begins a new conversation")
        elif re.fullmatch(r"/[a-z]+", line):
            print(f"not sent: there is no {line}; /help lists what there is")
        elif line.strip():
            await self._say(line)

    async def _say(self, line: str) -> None:
        is_first = len(self._messages) == len(self._opening)
        self._messages.append(inference_pb2.ChatMessage(role="user", content=line))
        answer = Answer()
        try:
            was_ended = await self._ask(answer)
        except BatonError as error:
            print(f"not sent: {error}" if not answer.choices else f"cut short: {error}")
            if isinstance(error, InvalidArgument) and error.field in _OUTGROWN and not is_first:
                print("the conversation has become too long for the model: /clear forgets it")
        else:
            self._comment(answer, was_ended)
        if answer.only.text:
            self._messages.append(inference_pb2.ChatMessage(role="assistant", content=answer.only.text))
        else:
            self._messages.pop()  # what got no answer was not said

    async def _ask(self, answer: Answer) -> bool:
        """Print the answer as it comes. Returns whether Ctrl-C ended it, which cancels the request."""
        chat = inference_pb2.ChatMessages(messages=self._messages)
        request = inference_pb2.GenerateRequest(chat=chat, sampling=self._sampling)
        asking = asyncio.create_task(stream_to_stdout(self._client, request, self._timeout_s, answer))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, asking.cancel)
        try:
            await asyncio.wait({asking})
        finally:
            loop.remove_signal_handler(signal.SIGINT)  # a KeyboardInterrupt again
            asking.cancel()
        if asking.cancelled():
            return True
        asking.result()
        return False

    def _comment(self, answer: Answer, was_ended: bool) -> None:
        if was_ended:
            print("(ended by Ctrl-C)")
        elif answer.only.finish_reason == sampling_pb2.FINISH_REASON_LENGTH:
            used = answer.usage.num_prompt_tokens + answer.usage.num_output_tokens
            full = "; the context is full: /clear forgets the conversation" if used >= self._context_length else ""
            print(f"(cut at {answer.usage.num_output_tokens} tokens{full})")


def _read_line() -> str | None:
    """None at the end of standard input. Raises `InvalidArgument` for what is no text."""
    try:
        line = input(PROMPT)
        line.encode()
    except EOFError:
        return None
    except UnicodeError as error:
        raise InvalidArgument("standard input", "a line", f"not UTF-8: {error}") from error
    return line.strip() if line.startswith("/") else line
