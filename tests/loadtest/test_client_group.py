"""Client processes as the generator starts them."""

from __future__ import annotations

import os

from loadtest.client_group import client_group
from loadtest.client_messages import ClientSpec
from loadtest.prompts import PromptSpec
from loadtest.sender import SendOptions
from loadtest.targets.base import TargetSpec
from tests.loadtest.fake_inference import FakeInference, serving


async def test_a_terminals_ctrl_c_does_not_reach_clients_however_early_it_comes() -> None:
    """It goes to a whole process group; a client that still imports would end, and the report with it."""
    async with serving(FakeInference()) as fake:
        spec = ClientSpec(TargetSpec("baton", fake.address), PromptSpec(0, 900, 512), SendOptions(600.0, 64))
        async with client_group([spec]) as clients:
            (process,) = clients._processes
            assert os.getpgid(process.pid) not in (os.getpgrp(), 0)
