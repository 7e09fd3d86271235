"""What a checkpoint says of sampling is served as transformers would generate with it, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from baton.v1 import inference_pb2, sampling_pb2
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from common.errors import ModelError
from services.router.generation_config import (
    NO_DEFAULTS,
    DefaultsSource,
    SamplingDefaults,
    eos_token_ids,
    parse_sampling_defaults,
    read_eos_sources,
    read_sampling_defaults,
)
from services.router.served_model import load_served_model
from services.router.validation import ModelLimits, resolve_sampling, validate
from tests.router.byte_checkpoint import EOS_TOKEN_ID, VOCAB_SIZE, byte_ids, write_byte_checkpoint
from tests.router.cluster import running_cluster

QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
# Values of each key: some that change nothing, some that do, some that nobody could mean.
VALUES: Mapping[str, tuple[object, ...]] = {
    "temperature": (None, 1.0, 0.5, 2.0, 0.0, -1.0, 11.0, "hot", True),
    "top_p": (None, 1.0, 0.9, 0.2, 0.0, 1.5, [0.9]),
    "top_k": (None, 0, 1, 5, 500, -1, 2.5),
    "min_p": (None, 0.0, 0.2, 1.0, -0.5),
    "repetition_penalty": (None, 1.0, 1.05, 1.3, 0.0, 100.0),
    "do_sample": (None, True, False, "yes", 1),
    "max_new_tokens": (None, 5, 0, 1.5),
    "max_length": (None, 40, 0),
    "min_new_tokens": (None, 0, 3, -1),
    "min_length": (None, 0, 9, "3"),
    "num_beams": (None, 1, 4),
    "num_return_sequences": (None, 1, 2),
    "typical_p": (None, 1.0, 0.5),
    "epsilon_cutoff": (None, 0.0, 0.3),
    "eta_cutoff": (None, 0.0, 0.3),
    "top_h": (None, 0.5),
    "no_repeat_ngram_size": (None, 0, 2),
    "encoder_repetition_penalty": (None, 1.0, 1.5),
    "encoder_no_repeat_ngram_size": (None, 0, 2),
    "bad_words_ids": (None, [[5], [6, 7]]),
    "sequence_bias": (None, [[[5], -10.0]]),
    "forced_bos_token_id": (None, 5),
    "forced_eos_token_id": (None, 1),
    "suppress_tokens": (None, [], [5, 9]),
    "begin_suppress_tokens": (None, [], [5]),
    "exponential_decay_length_penalty": (None, [2, 1.5]),
    "length_penalty": (None, 1.0, 2.0),
    "early_stopping": (None, False),
    "renormalize_logits": (None, True),
    "use_cache": (True, False),
    "transformers_version": ("4.37.0",),
}
PROMPT = list(range(3, 10))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=1, **sizes))


def scores_of(model: LlamaForCausalLM, config: Mapping[str, object], output: list[int]) -> torch.Tensor:
    """What transformers makes of some logits behind a prompt and an output. Returns [1, vocab] float32."""
    generation = GenerationConfig(**{"eos_token_id": 1, "max_length": 400} | dict(config))
    model._prepare_special_tokens(generation, device="cpu")
    prompt = torch.tensor([PROMPT])
    processors = model._get_logits_processor(generation, len(PROMPT), prompt, device="cpu")
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(len(output))) * 3
    return torch.log_softmax(processors(torch.tensor([PROMPT + output]), logits), -1)


def in_transformers(defaults: SamplingDefaults) -> dict[str, object]:
    """The same as a generation config."""
    values = dataclasses.asdict(defaults)
    if not defaults.temperature:
        return values | {"do_sample": False, "temperature": 1.0}
    return values | {"do_sample": True, "max_length": None}


def test_what_is_not_refused_generates_the_same_in_transformers(model: LlamaForCausalLM) -> None:
    source = random.Random(71)
    num_served = 0
    for _ in range(1500):
        keys = source.sample(sorted(VALUES), source.randint(0, 5))
        config = {key: source.choice(VALUES[key]) for key in keys}
        refusal = ""
        try:
            defaults = parse_sampling_defaults("generation_config.json", config)
        except ModelError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert any(refusal.startswith(f"generation_config.json: {key} = ") for key in keys), (config, refusal)
            continue
        num_served += 1
        greedy = defaults.temperature == 0.0
        reference = {key: value for key, value in config.items() if value is not None} | {"do_sample": not greedy}
        if greedy:
            reference["temperature"] = 1.0
        for output in ([], [5, 9, 1], [7] * 12):
            expected, ours = scores_of(model, reference, output), scores_of(model, in_transformers(defaults), output)
            torch.testing.assert_close(ours, expected, msg=str(config))
    assert num_served > 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 11.0}, r"generation_config.json: temperature = 11.0: must be in \[0, 10\]"),
        ({"top_p": 0.0}, "generation_config.json: top_p = 0.0: "),
        ({"bad_words_ids": [[5]]}, r"generation_config.json: bad_words_ids = \[\[5\]\]: .*--generation-defaults none"),
        ({"num_beams": 4}, "generation_config.json: num_beams = 4: cannot be served, only null or 1"),
        ({"eos_token_id": VOCAB_SIZE}, "generation_config.json: eos_token_id = 300: token ids are from 0 to 299"),
        ({"eos_token_id": [1, -1]}, "generation_config.json: eos_token_id = .*neither a token id nor a list of them"),
        ({"eos_token_id": "</s>"}, "generation_config.json: eos_token_id = '</s>': neither"),
        ({"eos_token_id": list(range(65))}, "generation_config.json: eos_token_id = .*at most 64"),
    ],
)
def test_what_cannot_be_served_ends_the_start_with_one_line(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    write_byte_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load_served_model("m", tmp_path, 1 << 20)
    assert "\n" not in str(caught.value)


def test_defaults_of_the_checkpoint_can_be_ignored_but_not_its_ends(tmp_path: Path) -> None:
    write_byte_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN | {"num_beams": 4, "eos_token_id": 7}))
    limits = load_served_model("m", tmp_path, 1 << 20, DefaultsSource.NONE).limits
    assert limits.defaults == NO_DEFAULTS
    assert limits.eos_token_ids == (7, EOS_TOKEN_ID)


def test_the_ends_are_those_of_both_configurations_and_of_the_tokenizer(tmp_path: Path) -> None:
    write_byte_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    assert load_served_model("m", tmp_path, 1 << 20).limits.eos_token_ids == (9, EOS_TOKEN_ID)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 9]}))
    assert load_served_model("m", tmp_path, 1 << 20).limits.eos_token_ids == (11, 9, EOS_TOKEN_ID)
    assert eos_token_ids(read_eos_sources(tmp_path), VOCAB_SIZE) == (11, 9)


def test_config_json_speaks_where_there_is_no_generation_config(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == NO_DEFAULTS
    (tmp_path / "config.json").write_text(json.dumps({"top_k": 3}))
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(top_k=3)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_sampling_defaults(tmp_path) == NO_DEFAULTS


@pytest.mark.parametrize(
    ("config", "temperature"),
    [({}, 1.0), ({"temperature": 0.6}, 0.6), ({"do_sample": False, "temperature": 0.6}, 0.0), ({"do_sample": True}, 1)],
)
def test_greedy_is_the_default_only_where_the_checkpoint_says_so(config: dict[str, object], temperature: float) -> None:
    assert parse_sampling_defaults("f", config).temperature == temperature


@pytest.mark.parametrize(
    ("config", "num_prompt", "given", "bounds"),
    [
        ({"max_new_tokens": 5}, 10, {}, (0, 5)),
        ({"max_length": 30}, 10, {}, (0, 20)),
        ({"max_length": 30}, 100, {}, (0, 1)),
        ({"max_new_tokens": 5}, 10, {"max_tokens": 50}, (0, 50)),
        ({"max_new_tokens": 5}, 10, {"min_tokens": 9}, (9, 9)),
        ({"min_new_tokens": 5}, 10, {"max_tokens": 3}, (3, 3)),
        ({"min_new_tokens": 5, "min_length": 30}, 10, {"max_tokens": 90}, (20, 90)),
        ({"min_new_tokens": 5}, 10, {"min_tokens": 0}, (0, 502)),
    ],
)
def test_lengths_of_the_checkpoint_hold_where_the_request_has_none(
    config: dict[str, object], num_prompt: int, given: dict[str, int], bounds: tuple[int, int]
) -> None:
    limits = ModelLimits("m", 512, 300, (0,), True, 1 << 20, defaults=parse_sampling_defaults("f", config))
    request = inference_pb2.GenerateRequest(text="a")
    for name, value in given.items():
        setattr(request.sampling, name, value)
    sampling = resolve_sampling(validate(request, limits), num_prompt, limits)
    assert (sampling.min_tokens, sampling.max_tokens) == bounds


async def test_a_request_that_says_nothing_is_sampled_as_the_checkpoint_says_and_told_so(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    async with running_cluster(tmp_path) as cluster:
        request = inference_pb2.GenerateRequest(text="hello")
        request.sampling.max_tokens = 3
        request.sampling.logit_bias[5] = 1.0
        first, *rest = [response async for response in cluster.stub.Generate(request)]
        applied = cluster.decodes[0].opened[0].sampling
        for name, value in QWEN.items():
            if name != "do_sample":
                assert getattr(applied, name) == pytest.approx(value), name
        assert applied.logit_bias == {5: 1.0}
        applied.ClearField("logit_bias")
        assert first.sampling == applied
        assert not any(response.HasField("sampling") for response in rest)


async def test_what_a_request_says_wins_also_where_it_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))
    async with running_cluster(tmp_path) as cluster:
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=byte_ids("hello")))
        request.sampling.MergeFrom(
            sampling_pb2.SamplingParams(max_tokens=3, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0)
        )
        await cluster.generate(request)
        applied = cluster.decodes[0].opened[0].sampling
        assert (applied.temperature, applied.top_k, applied.top_p, applied.repetition_penalty) == (0.0, 0, 1.0, 1.0)
