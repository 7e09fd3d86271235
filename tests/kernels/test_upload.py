"""Host arrays arrive in one piece each, whatever their sizes and dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.kernels.upload import IntArray, overwrite, upload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu


def test_arrays_of_any_size_arrive_as_they_are() -> None:
    arrays: list[IntArray] = [
        np.arange(5, dtype=np.int32),
        np.zeros((0, 4), dtype=np.int64),
        np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1:3],
        np.array([-1], dtype=np.int32),
    ]
    for array, tensor in zip(arrays, upload(arrays, DEVICE), strict=True):
        assert (tensor.device.type, tuple(tensor.shape)) == (DEVICE.type, array.shape)
        assert np.array_equal(tensor.cpu().numpy(), array)


def test_nothing_to_send_is_no_error() -> None:
    assert upload([], DEVICE) == []


def test_a_tensor_is_overwritten_in_place() -> None:
    table = torch.zeros((3, 2), dtype=torch.int32, device=DEVICE)
    overwrite(table[1], np.array([4, -5], dtype=np.int32))
    assert table.tolist() == [[0, 0], [4, -5], [0, 0]]
