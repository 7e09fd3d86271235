"""Launches of one variant run one compiled kernel, whatever Triton makes of their arguments; and those are few.

Run as a program it compiles for Hopper, which needs no GPU, and prints a JSON list; the test does that in a process of
its own, as kernels that were imported for the interpreter cannot be compiled.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final
from unittest import mock

import pytest
import torch

from benchmarks.compile_for_hopper import compile_for_hopper

ROOT: Final = Path(__file__).parents[2]
TIMEOUT_S: Final = 115


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [(name, variant, kernel) for name, variant, kernel in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_launches_of_one_variant_run_one_kernel(compiled: list[tuple[str, str, str]]) -> None:
    kernels: dict[str, set[str]] = {}
    for _, variant, kernel in compiled:
        kernels.setdefault(variant, set()).add(kernel)
    assert len(kernels) >= 15  # the arguments differ in what Triton looks at
    assert [variant for variant, found in kernels.items() if len(found) > 1] == []


@pytest.mark.slow
def test_legs_of_any_length_and_layers_need_no_other_kernels(compiled: list[tuple[str, str, str]]) -> None:
    assert len({kernel for name, _, kernel in compiled if name == "8B"}) == 3  # gather, check, scatter


def compile_all() -> list[tuple[str, str, str]]:
    """(name of the shape, variant, hash of the kernel that Triton launches for it) of every launch."""
    from common.kernels import triton_blocks

    found: list[tuple[str, str, str]] = []
    variants: list[str] = []
    compile_for_hopper(lambda kernel: found.append((name, variants[-1], kernel.hash)))
    variant_of = triton_blocks._variant

    def noted(*arguments: object) -> tuple[object, ...]:
        variant = variant_of(*arguments)  # type: ignore[arg-type]
        variants.append(repr(variant))
        return variant

    def launch(kv: torch.Tensor, num_ids: int, first_head: int, num_heads: int, offset: int) -> None:
        num_bytes = 64 + kv[:, 0, :, 0].nbytes * num_ids * num_heads
        slot = torch.empty(num_bytes + offset, dtype=torch.uint8, device=kv.device)[offset:]
        words, scratch, report = (torch.empty(64, dtype=torch.int64, device=kv.device)[num_ids % 2 :] for _ in range(3))
        triton_blocks.gather_slot(kv, words, num_ids, first_head, num_heads, slot, scratch)
        triton_blocks.scatter_slot(kv, words, num_ids, first_head, num_heads, slot, scratch, report)
        ids = torch.zeros(num_ids, dtype=torch.int64, device=kv.device)
        payload = slot[64:].view(kv.dtype)
        triton_blocks.scatter_with_digest(kv, ids, first_head, num_heads, payload)

    with mock.patch.object(triton_blocks, "_variant", noted):
        name = "8B"
        whole = torch.empty(8, 6, 2, 8, 64, 128, dtype=torch.bfloat16)
        for layers, num_ids in ((range(8), 1), (range(1), 3), (range(3, 8), 2), (range(7, 8), 5)):
            kv = whole[layers.start : layers.stop]
            num_bytes = 64 + kv[:, 0].nbytes * num_ids
            slot = torch.empty(num_bytes + 16 * num_ids, dtype=torch.uint8)[16 * num_ids :]
            words, scratch, report = (torch.empty(64, dtype=torch.int64) for _ in range(3))
            triton_blocks.gather_slot(kv, words, num_ids, 0, 8, slot, scratch)
            triton_blocks.scatter_slot(kv, words, num_ids, 0, 8, slot, scratch, report)
        name = "odd"
        for dtype in (torch.bfloat16, torch.float32):
            for block_size, head_dim in ((16, 8), (1, 12), (2, 8), (1, 4)):
                kv = torch.empty(1, 6, 2, 4, block_size, head_dim, dtype=dtype)
                for num_ids, first_head, num_heads, offset in ((1, 0, 1, 0), (2, 1, 1, 8), (3, 2, 2, 16), (4, 0, 4, 8)):
                    launch(kv, num_ids, first_head, num_heads, offset)
        name = "wide"  # words that 32 bits cannot count
        kv = torch.empty(1, 1 << 17, 2, 8, 64, 128, dtype=torch.bfloat16, device="meta")
        for num_ids in (2, 3):
            launch(kv, num_ids, 0, 8, 0)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))  # noqa: T201
