"""A deployment without a checkpoint: workers draw the same model, whatever their rank counts."""

from __future__ import annotations

import shutil
from pathlib import Path

from cli.deployment import DeploymentSpec
from tests.integration.deployments import deployed
from tests.integration.requests import ask, greedy_request

DRAWN = ("--random-weights", "--dtype", "float32")
PROMPT = list(range(3, 203))


def _copy_all_but_weights(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, target)


async def test_prefill_and_decode_draw_one_model(shipped_model: Path, tmp_path: Path) -> None:
    _copy_all_but_weights(shipped_model, tmp_path)
    outputs = []
    for prefill, local in ((1, "never"), (0, "always")):
        spec = DeploymentSpec(
            model=tmp_path,
            num_prefill=prefill,
            decode_tp=2 if prefill else 1,
            prefill_args=DRAWN,
            decode_args=DRAWN,
            router_args=("--local-prefill", local),
        )
        async with deployed(spec) as (_, client):
            outputs.append((await ask(client, greedy_request(PROMPT, 12))).tokens)
    assert len(outputs[0]) == 12
    assert outputs[0] == outputs[1]
