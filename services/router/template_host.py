"""Renders chats in a process of their own, which is killed when it takes too long, and started again for the next chat.

One chat at a time: rendering takes microseconds, and what takes longer ends within a bound. Knows nothing of templates.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from common.errors import InternalError, InvalidArgument, ModelError, Unavailable
from common.parent_death import environment_of_child
from common.worker.framing import AsyncFrames
from services.router.chat_template import MAX_RENDER_S
from services.router.template_process import Answer, Broken, Chat, Ready, Refused, Rendered, Templates
from services.router.validation import Shown

_logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 10.0
RENDER_GRACE_S: Final = 0.25  # the process looks at the clock itself whenever a template writes
CANCELLED_GRACE_S: Final = 0.1  # for the answer to a chat that was cancelled: less than it takes to start a process
NUM_TRIES: Final = 2

_decoder = msgspec.msgpack.Decoder(Answer)


@dataclass(frozen=True, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    frames: AsyncFrames

    async def end(self) -> None:
        """Kill it, whatever it does, and take it off the system's table."""
        if self.process.returncode is None:
            self.process.kill()
        self.frames.begin_close()
        await self.process.wait()


class TemplateHost:
    """The process is started by the first chat, or by `start`. `aclose` ends it."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        time_limit_s: float = MAX_RENDER_S + RENDER_GRACE_S,
    ) -> None:
        self._templates = Templates(dict(sources), dict(special_tokens))
        self.time_limit_s = time_limit_s
        self._turn = asyncio.Lock()
        self._child: _Child | None = None

    async def start(self) -> None:
        """Have the process ready, so that the first chat does not wait for it. Nothing to do without a template."""
        async with self._turn:
            if self._child is None and self._templates.sources:
                try:
                    self._child = await self._started()
                except Unavailable as error:
                    _logger.warning("%s; the next chat tries again", error)

    async def aclose(self) -> None:
        """End the process. A chat that comes later would start another."""
        async with self._turn:
            await self._end_child()

    async def render(self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool) -> str:
        """The prompt of these messages (role and content), special tokens included.

        Raises `InvalidArgument` for what the template refuses, or takes too long for, and `ModelError` if the template
        is broken. When cancelled while the template runs, the process is ended, unless it answers very soon.
        """
        chat = Chat(list(messages), add_generation_prompt)
        async with self._turn:
            for _ in range(NUM_TRIES):
                answer = await self._ask(chat)
                if answer is not None:
                    return _prompt(answer)
        # Twice: the first time somebody else may have killed it.
        raise InvalidArgument("messages", f"{len(messages)} messages", "end the process that renders the chat template")

    async def _ask(self, chat: Chat) -> Answer | None:
        """None if the process ended instead of answering."""
        if self._child is None:
            self._child = await self._started()
        frames = self._child.frames
        try:
            frames.send(chat)
        except ValueError as error:  # larger than a frame
            raise InvalidArgument("messages", f"{len(chat.messages)} messages", str(error)) from error
        receiving = asyncio.create_task(frames.receive())
        frame, is_late = None, False
        try:
            await asyncio.wait({receiving}, timeout=self.time_limit_s)
            is_late = not receiving.done()
        except asyncio.CancelledError:
            await asyncio.wait({receiving}, timeout=CANCELLED_GRACE_S)
            raise
        finally:
            if receiving.done():
                frame = receiving.result()
            if frame is None:
                receiving.cancel()
                await self._end_child()
        if is_late:
            limit = f"must render within {MAX_RENDER_S:g} s"
            raise InvalidArgument("messages", f"{len(chat.messages)} messages", limit)
        return None if frame is None else _decoder.decode(frame)

    async def _started(self) -> _Child:
        own, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.router.template_process",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=environment_of_child(),
            )
        except OSError as error:
            own.close()
            raise Unavailable(f"the process that renders chats does not start: {error}") from error
        except BaseException:
            own.close()
            raise
        finally:
            theirs.close()
        child = _Child(process, await AsyncFrames.open(own))
        is_ready = False
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                child.frames.send(self._templates)
                is_ready = await child.frames.receive() is not None
        except TimeoutError as error:
            late = f"the process that renders chats is not ready within {START_TIMEOUT_S:g} s"
            raise Unavailable(late) from error
        finally:
            if not is_ready:
                await child.end()
        if not is_ready:
            raise Unavailable(f"the process that renders chats ended with status {process.returncode} at its start")
        return child

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()


def _prompt(answer: Answer) -> str:
    match answer:
        case Rendered():
            return answer.text
        case Refused():
            raise InvalidArgument(answer.field, Shown(answer.value), answer.limit)
        case Broken():
            raise ModelError(answer.message)
        case Ready():
            raise InternalError("the process that renders chats was ready twice")
