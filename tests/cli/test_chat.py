"""`baton chat` at a terminal, against a router that says what a test wants."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager

from baton.v1 import inference_pb2, sampling_pb2

from common.errors import BatonError, InvalidArgument, Unavailable
from tests.cli.fake_router import FakeRouter, serving
from tests.cli.terminal import Terminal, in_terminal

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def chat(router: FakeRouter, *args: str) -> AbstractAsyncContextManager[Terminal]:
    return in_terminal(sys.executable, "-m", "cli.main", "chat", "--address", router.address, *args)


def said(request: inference_pb2.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


async def test_ctrl_c_at_the_prompt_leaves_at_once() -> None:
    async with serving(FakeRouter()) as router, chat(router) as terminal:
        await terminal.prompt("\n> ")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 0
        assert "Traceback" not in terminal.text


async def test_ctrl_c_in_an_answer_ends_the_answer_and_not_the_conversation() -> None:
    async with serving(FakeRouter(pieces=("half",), stalls=True)) as router, chat(router) as terminal:
        await terminal.until("\n> ")
        terminal.type("tell me\n")
        await terminal.until("half")
        terminal.type(CTRL_C)
        await terminal.until("(ended by Ctrl-C)\n> ")
        await router.cancelled.wait()
        router.stalls = False
        terminal.type("go on\n")
        await terminal.until("half\n> ")
        assert said(router.requests[-1]) == [("user", "tell me"), ("assistant", "half"), ("user", "go on")]
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0


async def test_lines_are_edited_and_earlier_ones_come_back() -> None:
    async with serving(FakeRouter()) as router, chat(router) as terminal:
        await terminal.until("\n> ")
        terminal.type("first\n")
        await terminal.until("two\n> ")
        terminal.type(UP + "\x01very \n")  # Ctrl-A: to the beginning of the line
        await terminal.until("two\n> ")
        assert said(router.requests[-1])[-1] == ("user", "very first")


async def test_a_conversation_that_is_too_long_says_so_and_can_be_cleared() -> None:
    def refuse(request: inference_pb2.GenerateRequest) -> BatonError | None:
        full = len(request.chat.messages) > 3
        return InvalidArgument("chat", "70 tokens", "at most 63 tokens (context length 64)") if full else None

    async with serving(FakeRouter(refuse=refuse)) as router, chat(router, "--system", "be brief") as terminal:
        await terminal.until("\n> ")
        terminal.type("one\n")
        await terminal.until("two\n> ")
        for _ in range(2):
            terminal.type("more\n")
            assert "not sent: " in await terminal.until("/clear forgets it\n> ")
        terminal.type("/clear\n")
        await terminal.until("new conversation\n> ")
        terminal.type("again\n")
        await terminal.until("two\n> ")
        assert said(router.requests[-1]) == [("system", "be brief"), ("user", "again")]


async def test_an_answer_that_fills_the_context_says_so() -> None:
    router = FakeRouter(finish_reason=sampling_pb2.FINISH_REASON_LENGTH, num_prompt_tokens=62)
    async with serving(router), chat(router) as terminal:
        await terminal.until("\n> ")
        terminal.type("hello\n")
        await terminal.until("(cut at 2 tokens; the context is full: /clear forgets the conversation)\n> ")


async def test_a_failing_router_ends_no_conversation_and_commands_are_not_sent() -> None:
    async with (
        serving(FakeRouter(refuse=lambda request: Unavailable("no workers"))) as router,
        chat(router) as terminal,
    ):
        await terminal.until("/help says what else there is\n> ")
        terminal.type("hello\n")
        await terminal.until("not sent: no workers\n> ")
        router.refuse = lambda request: None
        for command, answer in (("/help", "/clear  forget"), ("/quit", "there is no /quit"), ("  ", "> ")):
            terminal.type(f"{command}\n")
            await terminal.until(answer)
            await terminal.until("\n> ")
        terminal.type("/usr/bin is what?\n")
        await terminal.until("two\n> ")
        assert [said(request) for request in router.requests[1:]] == [[("user", "/usr/bin is what?")]]
        terminal.type("/exit\n")
        assert await terminal.ended() == 0
