"""Chats are rendered within bounds of time and memory, whatever a template computes, and beside the router's loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from baton.v1 import inference_pb2

from common.errors import InvalidArgument, ModelError
from services.router.chat_template import ChatTemplate
from services.router.template_host import TemplateHost
from tests.router.cluster import running_cluster

CHATML = "{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content }};{% endfor %}{{ add_generation_prompt }}"
# What a chat may ask a template to do, by its content.
WORK = """{% set what = messages[0].content %}
{%- macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}
{%- if what == 'loops' %}{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}
{%- elif what == 'calls' %}{{ twice(60) }}
{%- elif what == 'power' %}{{ 7 ** (10 ** 8) }}
{%- elif what == 'filter' %}{{ 'a' | center(10 ** 11) }}
{%- elif what == 'product' %}{{ 'ab' * 10 ** 10 }}
{%- elif what == 'doubling' %}{% set ns = namespace(x='abcd') %}
    {%- for a in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}
{%- elif what == 'surrogate' %}{{ '\\ud800' }}
{%- else %}{{ what }}{% endif %}"""
CHAT = [("user", "hello"), ("assistant", "你好 \U0001f600"), ("user", "<s>")]


@contextlib.asynccontextmanager
async def hosted(source: str, time_limit_s: float = 60.0) -> AsyncIterator[TemplateHost]:
    async with contextlib.aclosing(TemplateHost({"default": source}, {"bos_token": "<s>"}, time_limit_s)) as host:
        yield host


async def render(host: TemplateHost, content: str) -> str:
    return await host.render([("user", content)], add_generation_prompt=True)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
async def test_the_prompt_is_the_one_that_the_template_renders(add_generation_prompt: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in CHAT]
    expected = ChatTemplate({"default": CHATML}, {"bos_token": "<s>"}).render(
        messages, add_generation_prompt=add_generation_prompt
    )
    async with hosted(CHATML) as host:
        await host.start()
        assert await host.render(CHAT, add_generation_prompt=add_generation_prompt) == expected
        long = [("user", "€" * 3_000_000)]
        assert len(await host.render(long, add_generation_prompt=add_generation_prompt)) > 3_000_000


async def test_what_computes_without_end_is_ended_and_the_next_chat_is_served() -> None:
    async with hosted(WORK, time_limit_s=0.3) as host:
        await host.start()
        for what in ("loops", "calls", "power"):
            slow = asyncio.create_task(render(host, what))
            for _ in range(100):  # the loop turns meanwhile
                await asyncio.sleep(0)
            assert not slow.done()
            with pytest.raises(InvalidArgument, match="must render within 2 s"):
                await slow
            assert await render(host, "hello") == "hello"


@pytest.mark.parametrize("what", ["filter", "product", "doubling"])
async def test_what_takes_memory_without_end_is_refused(what: str) -> None:
    async with hosted(WORK) as host:
        with pytest.raises(InvalidArgument, match="must render within 1024 MiB of memory"):
            await render(host, what)
        assert await render(host, "hello") == "hello"


async def test_what_the_template_refuses_is_told_as_it_is() -> None:
    async with hosted("{{ raise_exception('no ' + messages[0].content) }}") as host:
        with pytest.raises(InvalidArgument) as caught:
            await render(host, "tools")
        assert (caught.value.field, caught.value.value) == ("messages", "'no tools'")
    async with hosted(WORK) as host:
        with pytest.raises(InvalidArgument, match=r"do not fit the chat template: .*surrogates"):
            await render(host, "surrogate")
    async with hosted("{% for %}") as host:
        with pytest.raises(ModelError, match="does not compile"):
            await render(host, "hello")


async def test_a_process_that_is_killed_is_started_again() -> None:
    async with hosted(WORK) as host:
        assert await render(host, "one") == "one"
        assert host._child is not None
        os.kill(host._child.process.pid, signal.SIGKILL)
        assert await render(host, "two") == "two"


async def test_a_chat_that_is_cancelled_leaves_no_answer_for_the_next() -> None:
    async with hosted(WORK) as host:
        await host.start()
        slow = asyncio.create_task(render(host, "loops"))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(render(host, "next"))
        await asyncio.sleep(0)
        slow.cancel()
        assert await waiting == "next"
        assert slow.cancelled()


async def test_chats_that_are_cancelled_cost_no_process() -> None:
    async with hosted(WORK) as host:
        await host.start()
        first = host._child
        for number in range(5):
            cancelled = asyncio.create_task(render(host, f"hello {number}"))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait({cancelled})
            assert cancelled.cancelled()
        assert await render(host, "next") == "next"
        assert host._child is first


async def test_a_request_whose_template_loops_ends_and_others_go_on_meanwhile(tmp_path: Path) -> None:
    def chat(content: str) -> inference_pb2.GenerateRequest:
        message = inference_pb2.ChatMessage(role="user", content=content)
        request = inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages(messages=[message]))
        request.sampling.max_tokens = 3
        return request

    text = inference_pb2.GenerateRequest(text="hello")
    text.sampling.max_tokens = 3
    async with running_cluster(tmp_path, chat_template=WORK) as cluster:
        cluster.router.chats.time_limit_s = 0.5
        slow = asyncio.create_task(cluster.generate(chat("loops")))
        await cluster.generate(text)
        assert not slow.done()
        with pytest.raises(grpc.aio.AioRpcError, match="must render within 2 s") as caught:
            await slow
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len((await cluster.generate(chat("hello")))[0].token_ids) == 3
