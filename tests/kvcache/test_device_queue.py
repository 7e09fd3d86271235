"""Numbers to the device and back, and work that is waited for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.kvcache.device_queue import DeviceQueue

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_come_back_as_they_went_whatever_their_count(device: str) -> None:
    queue = DeviceQueue(torch.device(device))
    for size in (3, 1000, 1, 5000):
        words = np.arange(size, dtype=np.int64) - (1 << 62)
        with queue.entered():
            uploaded = queue.upload(words)
            words[:] = 0  # the caller may reuse its memory at once
            doubled = uploaded * 2
            back = queue.download((uploaded, doubled[:1]))
        assert back.tolist() == [*(value - (1 << 62) for value in range(size)), 2 * -(1 << 62)]


@pytest.mark.parametrize("device", DEVICES)
def test_marked_work_is_done_once_it_was_waited_for(device: str) -> None:
    queue = DeviceQueue(torch.device(device))
    with queue.entered():
        total = torch.ones(1 << 20, device=device).sum()
        work = queue.mark()
    work.wait()
    assert work.done()
    assert total.item() == 1 << 20
