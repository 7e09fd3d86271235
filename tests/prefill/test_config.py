"""Settings that cannot work are refused at the start."""

from __future__ import annotations

import pytest

from common.config import load_config
from common.errors import InvalidArgument
from services.prefill.config import PrefillConfig


def load(*flags: str) -> PrefillConfig:
    return load_config(PrefillConfig, ["--model", "somewhere", *flags], {})


def test_defaults_are_valid_and_reach_the_scheduler() -> None:
    limits = load("--policy", "first-come", "--max-rows", "7").scheduler_limits
    assert (limits.policy, limits.max_rows, limits.max_step_tokens) == ("first-come", 7, 2048)


def test_reserved_tokens_are_whole_blocks_and_at_least_one() -> None:
    assert load().scheduler_limits.reserved_tokens(64) == 512
    assert load("--max-step-tokens", "128").scheduler_limits.reserved_tokens(64) == 64


def test_slots_are_larger_on_gpus_unless_told_otherwise() -> None:
    assert (load().num_slots, load().slot_bytes) == (4, 8 << 20)
    on_gpu = load("--device", "cuda")
    assert (on_gpu.num_slots, on_gpu.slot_bytes >> 20) == (8, 64)
    assert load("--device", "cuda", "--slot-bytes", "4096").slot_bytes == 4096


def test_steps_are_captured_as_far_as_there_are_such_steps() -> None:
    assert load().captured_tokens == 512
    assert load("--max-step-tokens", "256").captured_tokens == 256
    assert load("--capture-tokens", "0").captured_tokens == 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-step-tokens", "127"),
        ("--policy", "longest-first"),
        ("--oldest-share", "0"),
        ("--oldest-share", "0.9"),
        ("--slot-bytes", "5000"),
        ("--worker-id", "two words"),
        ("--device", "tpu"),
        ("--listen", "127.0.0.1"),
        ("--listen", "127.0.0.1:99999"),
        ("--listen", "two words:1"),
        ("--transport-url", "foo://x"),
    ],
)
def test_setting_that_cannot_work_is_named(flag: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        load(flag, value)
