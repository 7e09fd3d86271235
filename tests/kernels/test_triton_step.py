"""What a step's chunks are told when it is over."""

from __future__ import annotations

import pytest
import torch

from common.kernels.triton_step import judge_chunks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_is_bad_if_the_first_number_of_any_of_its_tokens_is(bad: float, dtype: torch.dtype) -> None:
    hidden = torch.zeros((1500, 24), dtype=dtype, device=DEVICE)
    hidden[[4, 1499], 0] = bad
    hidden[6, 1:] = bad  # of no interest: what its K and V would be is computed by nobody
    chunks = [(0, 4), (4, 1), (5, 7), (12, 0), (12, 1487), (12, 1488), (3, 5)]
    places, lengths = torch.tensor(chunks, dtype=torch.int32, device=DEVICE).t().contiguous()
    answers = torch.full((len(chunks) + 3,), 7, dtype=torch.int32, device=DEVICE)
    judge_chunks(hidden, places, lengths, answers[3:])
    assert answers.tolist() == [7, 7, 7, 0, 1, 0, 0, 0, 1, 1]
