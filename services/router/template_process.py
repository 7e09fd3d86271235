"""The process that renders chats, one after the other, and the messages that it exchanges with the router.

A template is a program, and what it computes depends on what clients send: `{% for %}` in `{% for %}` writes nothing
for hours, `center(10 ** 9)` takes a gigabyte in one call that no thread can be stopped in. Checks between its steps do
not bound it; a process does, since it can be killed and its memory has a limit. It ends with the router.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from common.errors import InvalidArgument, ModelError
from common.parent_death import end_with_parent
from common.worker.framing import BlockingFrames
from services.router.chat_template import ChatTemplate

MAX_MEMORY_BYTES: Final = 1 << 30  # beyond what the process has when it is ready


class Templates(msgspec.Struct, frozen=True, tag=True):
    """The first message: what to render with."""

    sources: dict[str, str]
    special_tokens: dict[str, str]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The answer to it."""


class Chat(msgspec.Struct, frozen=True, tag=True):
    """Messages to render: role and content, oldest first."""

    messages: list[tuple[str, str]]
    add_generation_prompt: bool


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The prompt."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why there is none: the parts of an `InvalidArgument`, the value as it is to be shown."""

    field: str
    value: str
    limit: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The template does not compile."""

    message: str


Answer = Ready | Rendered | Refused | Broken


def answer(template: ChatTemplate, chat: Chat) -> Answer:
    """Render one chat. What is wrong with it is an answer too."""
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    try:
        return Rendered(template.render(messages, add_generation_prompt=chat.add_generation_prompt))
    except InvalidArgument as error:
        return Refused(error.field, error.value, error.limit)
    except ModelError as error:
        return Broken(str(error))


def send_answer(frames: BlockingFrames, template: ChatTemplate, chat: Chat) -> None:
    """Render one chat and send what came of it, also if that cannot be sent."""
    try:
        frames.send(answer(template, chat))
        return
    except MemoryError:
        limit = f"must render within {MAX_MEMORY_BYTES >> 20} MiB of memory"
    except ValueError as error:  # too large for a frame, or no Unicode
        limit = f"do not fit the chat template: {error}"
    frames.send(Refused("messages", repr(f"{len(chat.messages)} messages"), limit))


def serve(frames: BlockingFrames) -> None:
    """Answer until the router is gone."""
    first = frames.receive()
    if first is None:
        return
    templates = msgspec.msgpack.decode(first, type=Templates)
    template = ChatTemplate(templates.sources, templates.special_tokens)
    _limit_memory()
    frames.send(Ready())
    decoder = msgspec.msgpack.Decoder(Chat)
    while (frame := frames.receive()) is not None:
        send_answer(frames, template, decoder.decode(frame))


def _limit_memory() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """`python -m services.router.template_process DESCRIPTOR`, of a connected socket."""
    # What stops the router is the router's to handle: it may still have chats to render.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(os.environ)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        serve(BlockingFrames(sock))


if __name__ == "__main__":
    main()
