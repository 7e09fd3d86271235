"""Whatever is in a configuration: the answers of transformers on the same directory, or a refusal that names why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from common.models.json_object import shown
from common.worker.worker_model import read_worker_model
from tests.models.odd_configs import BASES, changed, changes
from tests.models.paged_run import load_decoder, load_reference, paged_logprobs, random_tokens
from tests.models.tiny_checkpoints import VOCAB_SIZE, write_tiny_checkpoint

TOLERANCE = 1e-4
PROMPT: Final = random_tokens(44, VOCAB_SIZE, seed=1)
NUM_STEPS: Final = 3  # of decode, behind the prompt's first tokens
_OF_CONFIG: Final = re.compile(r"config\.json: ([\w.-]+) (= (.+)|is missing), ")
_OF_TENSORS: Final = re.compile(r"tensor \S+ (is missing in \S+, |has (shape|dtype) |of shape |is not )")
_served: list[bool] = []


@pytest.fixture(scope="module", autouse=True)
def quiet_and_alone() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@cache
def checkpoint(family: str) -> tuple[Path, dict[str, object]]:
    """Written once; only its config.json changes."""
    path = write_tiny_checkpoint(family, Path(mkdtemp()), seed=3)
    return path, json.loads((path / "config.json").read_bytes())


def reference_model(path: Path, config: Mapping[str, object], family: str) -> PreTrainedModel:
    """transformers' automatic choice goes by `model_type`; without it, `architectures` names the class as well."""
    if "model_type" not in config:
        _, written = checkpoint(family)
        (path / "config.json").write_text(json.dumps({**config, "model_type": written["model_type"]}))
    return load_reference(path)


@torch.inference_mode()
def reference_steps(model: PreTrainedModel) -> torch.Tensor:
    """[tokens, vocab] log-probabilities: most of the prompt at once, the last ones through the KV cache."""
    first = model(torch.tensor([PROMPT[:-NUM_STEPS]]), use_cache=True, return_dict=True)
    logits = [first.logits[0]]
    for token in PROMPT[-NUM_STEPS:]:
        step = model(torch.tensor([[token]]), past_key_values=first.past_key_values, use_cache=True, return_dict=True)
        logits.append(step.logits[0])
    return torch.cat(logits).float().log_softmax(dim=-1)


def assert_told(error: ModelError, config: Mapping[str, object]) -> None:
    """In one line, with the file, the key and its value, or the tensor and what is wrong with it."""
    text = str(error)
    assert "\n" not in text
    if _OF_TENSORS.search(text):
        return
    told = _OF_CONFIG.search(text)
    assert told is not None, text
    value: object = config
    for part in told[1].split("."):
        assert isinstance(value, dict)
        value = value.get(part, {}) if told[2] == "is missing" else value[part]
    assert told[2] == "is missing" or told[3].startswith(shown(value)), text


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(family=st.sampled_from(BASES), change=changes())
def test_a_configuration_is_obeyed_or_refused(family: str, change: dict[str, object]) -> None:
    path, config = checkpoint(family)
    config = changed(config, change)
    (path / "config.json").write_text(json.dumps(config))
    try:
        read_worker_model(path, "cpu", "auto", 64, 1)
    except ModelError as error:
        assert_told(error, config)
        _served.append(False)
        return
    _served.append(True)
    expected = reference_steps(reference_model(path, config, family))
    steps = [[len(PROMPT) - NUM_STEPS]] + [[1]] * NUM_STEPS
    (own,) = paged_logprobs(load_decoder(path), [PROMPT], steps, seed=1)
    assert (own - expected).abs().max().item() < TOLERANCE
    assert torch.equal(own.argmax(dim=-1), expected.argmax(dim=-1))


def test_enough_of_them_were_served() -> None:
    """Behind the property, whose draws do not change from run to run."""
    assert not _served or sum(_served) > 100
