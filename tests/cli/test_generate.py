"""`baton generate` against a router that says what a test wants: what is printed, and how it ends."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from cli.main import main
from common.errors import InvalidArgument, Unavailable
from tests.cli.fake_router import FakeRouter, serving

GENERATE = (sys.executable, "-m", "cli.main", "generate")


async def generate(router: FakeRouter, *args: str) -> int:
    """The exit status."""
    async with serving(router):
        return await asyncio.to_thread(main, ["generate", *args, "--address", router.address])


async def test_the_text_is_streamed_and_ends_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeRouter(), "prompt") == 0
    assert capsys.readouterr().out == "one two\n"


async def test_the_prompt_is_printed_before_it_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeRouter(), "say: ", "--echo") == 0
    assert capsys.readouterr().out == "say: one two\n"


async def test_log_probabilities_are_printed_with_text_and_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeRouter(pieces=("[b]", "two\n")), "prompt", "--logprobs", "2") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "-0.250" in line]
    assert len(rows) == 2
    assert "'[b]'" in rows[0]
    assert r"'two\n'" in rows[1]
    assert all(r"b'\xc3' -1.500" in row for row in rows)


async def test_each_of_several_outputs_has_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert await generate(FakeRouter(), "prompt", "--n", "2", "--stats", "--logprobs", "0", "--echo") == 0
    printed = capsys.readouterr().out
    assert "--- 0 ---\npromptone two\n--- 1 ---\npromptone two\n" in printed
    for title in ("lifetime of output 0", "lifetime of output 1", "log-probabilities of output 1"):
        assert title in printed
    assert "1.00 ms" in printed
    assert "2.00 ms" in printed


async def test_a_value_that_the_router_refuses_is_a_wrong_argument(capsys: pytest.CaptureFixture[str]) -> None:
    router = FakeRouter(refuse=lambda request: InvalidArgument("text", "x", "shorter"))
    assert await generate(router, "prompt") == 2
    assert capsys.readouterr().err == "baton generate: InvalidArgument: text = 'x': shorter\n"


async def test_an_error_in_mid_stream_begins_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    router = FakeRouter(pieces=("half",), stalls=True)
    assert await generate(router, "prompt", "--timeout", "1.5") == 1
    captured = capsys.readouterr()
    assert captured.out == "half\n"
    limit = f"{router.address} did not answer in full within the deadline"
    assert captured.err == f"baton generate: DeadlineExceeded: {limit}\n"


async def test_a_router_that_refuses_is_quoted_and_not_called_absent(capsys: pytest.CaptureFixture[str]) -> None:
    router = FakeRouter(refuse=lambda request: Unavailable("failed to connect to a worker"))
    assert await generate(router, "prompt") == 1
    assert capsys.readouterr().err == "baton generate: Unavailable: failed to connect to a worker\n"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no server at 127.0.0.1:9; `baton up` starts one"),
        ("no-such-host.invalid:9", "no server at no-such-host.invalid:9: there is no host of that name"),
    ],
)
def test_without_a_server_it_says_what_starts_one(address: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--address", address, "--timeout", "5"]) == 1
    assert capsys.readouterr().err == f"baton generate: Unavailable: {said}\n"


def test_input_that_is_no_text_is_a_wrong_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["generate", "-", "--address", "127.0.0.1:9"]) == 2
    assert "standard input = b'\\xff': not UTF-8 from byte 2 on" in capsys.readouterr().err


async def test_it_ends_quietly_when_nobody_reads_any_more() -> None:
    async with serving(FakeRouter(is_endless=True)) as router, asyncio.timeout(60.0):
        process = await asyncio.create_subprocess_exec(
            *GENERATE,
            *("prompt", "--address", router.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert await process.stdout.readexactly(4) == b"one "
        process.stdout._transport.close()  # type: ignore[attr-defined]
        errors = await process.stderr.read()
        assert await process.wait() == 141
        assert errors == b""
        await router.cancelled.wait()
