"""The rows that are timed beside the libraries' compute the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.library_rows import layer_norm, softmax

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


def test_layer_norm_and_softmax() -> None:
    x, weight, bias = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight, bias = weight[0], bias[0]
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-5), functional.layer_norm(x, (100,), weight, bias))
    torch.testing.assert_close(softmax(x), x.softmax(-1))
