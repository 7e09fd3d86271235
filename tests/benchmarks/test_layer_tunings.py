"""What the layer tuner tries and prints, and that its compilation finds what spills. Timing needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.decode_layer import Step
from benchmarks.kernel_timing import relative_error
from benchmarks.layer_launches import launches_of, served_launches
from benchmarks.layer_tunings import MULTIPROCESSORS, RANK_SHAPES, SHARED_BYTES, Layer, candidates, tuned_line
from benchmarks.random_model import random_decoder, random_storage, read_shape
from benchmarks.tune_layer import BATCHES, first_layers, lone_rank, tuned
from common.kernels import linear_tuning, reference
from common.kernels.batch import Span
from common.kernels.linear_tuning import TUNED, Kind, LinearTuning

ROOT = Path(__file__).parents[2]
# Compiles two launches of 64 rows: half a head of 64 columns is too much for the registers, 32 columns are not.
SPILLS = """
from dataclasses import replace
from benchmarks.layer_launches import ProductLaunch, compile_launch, prepare_process
from benchmarks.layer_tunings import RANK_SHAPES
from common.kernels.linear_tuning import Launch, LinearTuning
prepare_process()
layer = RANK_SHAPES["8b"].layer()
good = LinearTuning(32, 128, 1, 7, swap=False, launch=Launch.AT_END, prefetch_bytes=512)
for tuning in (good, replace(good, block_n=64, block_k=64, split=2, num_stages=9, swap=True)):
    print(compile_launch(ProductLaunch(layer, "qkv", 64, tuning, parts=64)))
"""


@pytest.mark.parametrize("name", RANK_SHAPES)
def test_candidates_fit_on_the_device_at_once(name: str) -> None:
    layer = RANK_SHAPES[name].layer()
    for rows in BATCHES:
        for product, (num_in, num_out, kind) in layer.products.items():
            found = candidates(layer, product, rows)
            assert len(found) == len(set(found)) >= 5
            for tuning in found:
                tiles = 1 if kind == Kind.PLAIN else 2
                stage_bytes = (tuning.block_n * tiles + rows) * tuning.block_k * 2
                programs = num_out // (tuning.block_n * tiles) * tuning.split
                of_multiprocessor = -(-programs // MULTIPROCESSORS)
                assert of_multiprocessor * stage_bytes * tuning.num_stages <= SHARED_BYTES
                assert num_in >= 512 * tuning.split
                assert kind != Kind.ROTATED or layer.head_dim // 2 % tuning.block_n == 0


def test_ranks_of_two_have_half_the_heads_and_columns() -> None:
    assert RANK_SHAPES["70b-tp2"].layer().products == {
        "qkv": (8192, 5120, Kind.ROTATED),
        "o": (4096, 8192, Kind.PLAIN),
        "gate_up": (8192, 28672, Kind.GATED),
        "down": (14336, 8192, Kind.PLAIN),
    }


@pytest.mark.parametrize("name", RANK_SHAPES)
def test_lines_to_paste_say_what_was_found(name: str) -> None:
    layer = RANK_SHAPES[name].layer()
    for rows in BATCHES:
        for product in layer.products:
            key = layer.key(product, rows)
            for tuning in candidates(layer, product, rows):
                entry = eval("{" + tuned_line(key, tuning) + "}", vars(linear_tuning).copy())
                assert entry == {key: tuning}


def test_a_layer_of_one_rank_hands_on_halves_of_norms() -> None:
    layer = RANK_SHAPES["8b"].layer()
    o, down = (TUNED[layer.key(product, 64)] for product in ("o", "down"))
    launches = {(launch.product, launch.parts, launch.adds) for launch in served_launches(layer, 64)}
    assert launches == {
        ("qkv", 0, False),
        ("qkv", 4096 // down.block_n, False),
        ("o", 0, True),
        ("gate_up", 4096 // o.block_n, False),
        ("down", 0, True),
        ("down", 0, False),
    }
    for product, ahead in (("qkv", "down"), ("gate_up", "o")):
        before = candidates(layer, ahead, 64)
        parts = {launch.parts for launch in launches_of(layer, product, 64, o, before)}
        assert parts == {0, 64, *(4096 // tuning.block_n for tuning in before)}


def test_tunings_are_in_force_for_a_while() -> None:
    before = dict(TUNED)
    key = (1, 2, Kind.PLAIN, 16)
    with tuned({key: LinearTuning(64, 64, 1, 2)}):
        assert {**before, key: LinearTuning(64, 64, 1, 2)} == TUNED
    assert before == TUNED


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_layers_are_checked_against_float64(ranks: int) -> None:
    torch.manual_seed(0)
    config = read_shape("qwen2.5-0.5b", 3)
    decoder = random_decoder(config, torch.device("cpu"), torch.float32, reference, group=lone_rank(ranks))
    first = first_layers(decoder, 2)
    storage = random_storage(first, 4)
    step = Step(first, storage, 2, 128)
    wide = step.wide(step.inputs[0])
    spans = [Span(1, 128, table) for table in step._tables.tolist()]
    plan = reference.plan_batch(spans, [None], storage.shape, torch.float32, first.device)
    out = first.forward(step.inputs[0], torch.full((2,), 127), plan, storage.kv)
    assert relative_error(out, wide) < 1e-5
    assert Layer.of(config, ranks).num_heads == 14 // ranks


@pytest.mark.slow
def test_what_spills_registers_is_found_when_compiling(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SPILLS], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    good, bad = done.stdout.splitlines()
    assert good == "None"
    assert bad.startswith("spills ")
