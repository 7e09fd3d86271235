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
    back: list[list[int]] = []
    works, sizes = [], (3, 1000, 1, 5000, 3)
    for size in sizes:
        words = np.arange(size, dtype=np.int64) - (1 << 62)
        with queue.entered():
            uploaded = queue.upload(words)
            words[:] = 0  # the caller may reuse its memory at once
            works.append(queue.download(uploaded * 2, lambda found: back.append(found.tolist())))
    assert back == []  # what is done with them is the outcome of the work
    for work in works:
        work.wait()
        work.result()
    assert back == [[2 * (value - (1 << 62)) for value in range(size)] for size in sizes]


@pytest.mark.parametrize("device", DEVICES)
def test_marked_work_is_done_once_it_was_waited_for(device: str) -> None:
    queue = DeviceQueue(torch.device(device))
    with queue.entered():
        total = torch.ones(1 << 20, device=device).sum()
        work = queue.mark()
    work.wait()
    assert work.done()
    assert total.item() == 1 << 20
