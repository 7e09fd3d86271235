"""Dependent launch: what kernels may read before they wait, and what a policy changes.

The interpreter runs no early start, so waiting itself stands in for the kernel ahead: inputs are NaN until then.
"""
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import triton.language as tl

from common.kernels import cuda_backend, dependent_launch, triton_backend, triton_linear
from common.kernels.batch import KVShape, Span
from common.kernels.dependent_launch import LaunchPolicy, by_policy, is_dependent, using
from common.kernels.linear_tuning import TUNED, Launch, LinearTuning
from common.kernels.scaled_rows import ScaledRows
from common.parallel import triton_all_reduce
from common.parallel.triton_all_reduce import PeerMemory

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")


@dataclass
class Ahead:
    """The kernel ahead, which writes when it is waited for."""

    pending: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    num_waits: int = 0
    num_triggers: int = 0
    num_fetched: int = 0

    def writes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hide the tensor's values until a program waits."""
        self.pending.append((tensor, tensor.clone()))
        return tensor.fill_(float("nan"))

    def wait(self) -> None:
        self.num_waits += 1
        while self.pending:
            tensor, values = self.pending.pop()
            tensor.copy_(values)

    def trigger(self) -> None:
        self.num_triggers += 1

    def fetch(self, *args: object, **options: object) -> None:
        self.num_fetched += 1


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ahead]:
    """Every launch is dependent where a Hopper GPU would launch it so."""
    stand_in = Ahead()
    monkeypatch.setattr(dependent_launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", stand_in.wait)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", stand_in.trigger)
    monkeypatch.setattr(tl, "inline_asm_elementwise", stand_in.fetch)
    yield stand_in
    assert not stand_in.pending, "nobody waited"
    assert stand_in.num_triggers >= stand_in.num_waits


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plainly(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What the same call returns launched plainly."""
    with using(LaunchPolicy(max_rows=0)):
        return call().clone()


def test_norms_read_weights_alone_before_they_wait(ahead: Ahead) -> None:
    x, residual, weight = random(3, 96), random(3, 96, seed=1), random(96, seed=2)
    expected = plainly(lambda: triton_backend.rms_norm(x, weight, 1e-5))
    assert ahead.num_triggers == 0
    assert torch.equal(triton_backend.rms_norm(ahead.writes(x), weight, 1e-5), expected)
    own = residual.clone()
    expected = plainly(lambda: triton_backend.add_rms_norm(x, own, weight, 1e-5))
    added = triton_backend.add_rms_norm(ahead.writes(x), ahead.writes(residual), weight, 1e-5)
    assert torch.equal(added, expected)
    assert torch.equal(residual, own)
    assert ahead.num_waits == ahead.num_triggers == 6


def test_a_sum_over_ranks_tells_nobody_before_it_waits(ahead: Ahead) -> None:
    """One rank alone, whose memory shows what others would be told."""
    x, residual, weight = random(3, 96), random(3, 96, seed=1), random(96, seed=2)
    memory = torch.zeros(triton_all_reduce.PEER_BYTES, dtype=torch.uint8)
    peers = PeerMemory.of(0, [memory.data_ptr()], CPU)
    own = residual.clone()
    expected = plainly(lambda: triton_all_reduce.all_reduce_add_rms_norm(x, own, weight, 1e-5, peers))
    assert ahead.num_triggers == 0
    added = triton_all_reduce.all_reduce_add_rms_norm(ahead.writes(x), ahead.writes(residual), weight, 1e-5, peers)
    assert torch.equal(added, expected)
    assert torch.equal(residual, own)
    assert not memory.view(torch.float32).isnan().any(), "a part was sent before it was there"
    assert ahead.num_waits == ahead.num_triggers == 3


def test_silu_reads_nothing_before_it_waits(ahead: Ahead) -> None:
    gate_up = random(3, 2 * 80)
    expected = plainly(lambda: triton_backend.silu_mul(gate_up))
    assert torch.equal(triton_backend.silu_mul(ahead.writes(gate_up)), expected)


@pytest.mark.parametrize("with_norm", [False, True])
def test_rotation_reads_angles_and_slots_before_it_waits(ahead: Ahead, with_norm: bool) -> None:
    shape = KVShape(7, 2, 16, 32)
    plan = cuda_backend.plan_batch([Span(20, 37, [3, 1, 5]), Span(1, 17, [0, 4])], [None], shape, torch.float32, CPU)
    cos, sin = random(21, 1, 32, seed=1), random(21, 1, 32, seed=2)
    q_norm, k_norm = (random(32, seed=seed) if with_norm else None for seed in (3, 4))

    def run(qkv: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return triton_backend.qk_norm_rope_store(qkv, 6, cos, sin, q_norm, k_norm, 1e-5, kv, plan)

    stored, expected_stored = random(7, 2, 2, 16, 32, seed=5), random(7, 2, 2, 16, 32, seed=5)
    expected = plainly(lambda: run(random(21, 10, 32), expected_stored))
    assert torch.equal(run(ahead.writes(random(21, 10, 32)), stored), expected)
    assert torch.equal(stored, expected_stored)


@pytest.mark.parametrize("window", [None, 20])
def test_attention_reads_lengths_and_tables_before_it_waits(ahead: Ahead, window: int | None) -> None:
    shape = KVShape(10, 2, 16, 32)
    spans = [Span(1, 37, [3, 1, 5]), Span(1, 17, [0, 4]), Span(1, 70, [2, 6, 7, 8, 9])]
    plan = cuda_backend.plan_batch(spans, [window], shape, torch.float32, CPU)
    q, kv = random(3, 8, 32), random(10, 2, 2, 16, 32, seed=1)
    expected = plainly(lambda: triton_backend.attention(q, kv, plan, window, 0.2))
    assert ahead.num_triggers == 0
    attended = triton_backend.attention(ahead.writes(q), ahead.writes(kv), plan, window, 0.2)
    assert torch.equal(attended, expected)


def test_attention_without_work_for_all_programs_still_waits(ahead: Ahead) -> None:
    """One short context: only the first program has a share."""
    plan = cuda_backend.plan_batch([Span(1, 5, [1])], [None], KVShape(2, 1, 16, 32), torch.float32, CPU)
    q, kv = random(1, 4, 32), random(2, 2, 1, 16, 32, seed=1)
    expected = plainly(lambda: triton_backend.attention(q, kv, plan, None, 0.2))
    assert torch.equal(triton_backend.attention(ahead.writes(q), kv, plan, None, 0.2), expected)
    assert ahead.num_waits == 1
    assert ahead.num_triggers > 1, "programs without a share let the next kernel start too"


@pytest.mark.parametrize("split", [1, 3])
def test_products_fetch_weights_alone_before_they_wait(ahead: Ahead, split: int) -> None:
    plain = LinearTuning(32, 32, split, num_stages=3, prefetch_bytes=512)
    tuning = replace(plain, launch=Launch.AT_END)
    x, weight, residual = random(5, 256), random(2 * 72, 256, seed=1).t(), random(5, 2 * 72, seed=2)
    expected = triton_linear.gate_up_silu_few(x, weight, plain)
    assert ahead.num_triggers == 0
    assert torch.equal(triton_linear.gate_up_silu_few(ahead.writes(x), weight, tuning), expected)
    own, norm = residual.clone(), random(2 * 72, seed=3)
    normed = triton_linear.linear_add_scale_few(x, weight, own, norm, 1e-5, plain)
    made = triton_linear.linear_add_scale_few(ahead.writes(x), weight, ahead.writes(residual), norm, 1e-5, tuning)
    assert torch.equal(residual, own)
    assert torch.equal(made.values, normed.values)
    assert torch.equal(made.squares, normed.squares)
    assert ahead.num_fetched > 0


@pytest.mark.parametrize("split", [1, 3])
def test_products_read_half_a_norm_after_they_have_waited(ahead: Ahead, split: int) -> None:
    plain = LinearTuning(16, 32, split, num_stages=3)
    tuning = replace(plain, launch=Launch.AT_END)
    rows = ScaledRows(random(5, 256), random(3, 16, seed=1).abs(), 1e-5)
    weight, slots = (random(6 * 32, 256, seed=2) * 0.05).t(), torch.tensor([3, 17, 18, -1, 40])
    cos, sin = random(5, 1, 32, seed=3), random(5, 1, 32, seed=4)

    def hidden() -> ScaledRows:
        return ScaledRows(ahead.writes(rows.values), ahead.writes(rows.squares), rows.eps)

    expected = triton_linear.gate_up_silu_few(rows, weight, plain)
    assert torch.equal(triton_linear.gate_up_silu_few(hidden(), weight, tuning), expected)
    kv, stored = random(7, 2, 1, 16, 32, seed=5), random(7, 2, 1, 16, 32, seed=5)
    cleaned = torch.zeros(5, dtype=torch.int32)
    expected = triton_linear.qkv_rope_store_few(rows, weight, 4, cos, sin, kv, slots, cleaned, plain)
    q = triton_linear.qkv_rope_store_few(hidden(), weight, 4, cos, sin, ahead.writes(stored), slots, cleaned, tuning)
    assert torch.equal(q, expected)
    assert torch.equal(stored, kv)


def test_only_few_rows_on_hopper_are_launched_dependently(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_dependent(1, CPU)
    monkeypatch.setattr(dependent_launch, "is_hopper", lambda device: True)
    assert is_dependent(128, CPU)
    assert not is_dependent(129, CPU)
    with using(LaunchPolicy(max_rows=8)):
        assert not is_dependent(9, CPU)
    assert is_dependent(9, CPU)


def test_a_policy_overrides_products_that_are_tuned_to_be_dependent() -> None:
    plain = LinearTuning(64, 64, split=4, num_stages=4, prefetch_bytes=512)
    tuned = replace(plain, launch=Launch.AT_END)
    assert by_policy(tuned) == tuned
    with using(LaunchPolicy(product_launch=Launch.PLAIN)):
        assert by_policy(tuned) == plain
    with using(LaunchPolicy(product_launch=Launch.AT_END)):
        assert by_policy(tuned) == tuned
        assert by_policy(plain) == plain
    assert all(tuning.launch == Launch.AT_END for tuning in TUNED.values())
