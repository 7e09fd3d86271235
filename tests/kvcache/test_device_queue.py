"""Numbers to the device and back, and work that is waited for."""

from __future__ import annotations

import struct

import pytest
import torch

from common.kvcache.device_queue import DeviceQueue, Parcel

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def filled(queue: DeviceQueue, values: range) -> Parcel:
    parcel = queue.parcel(len(values))
    parcel.host[: 8 * len(values)] = struct.pack(f"={len(values)}q", *values)
    parcel.send()
    return parcel


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_come_back_as_they_went_however_many_are_under_way(device: str) -> None:
    queue = DeviceQueue(torch.device(device), num_report_words=2)
    back: list[tuple[int, ...]] = []
    works, sizes = [], (3, 1000, 1, 5000, 3, 70, 70)
    for size in sizes:
        with queue.entered():
            parcel = filled(queue, range(size, 2 * size))
            parcel.report.copy_(torch.stack((parcel.words[:size].sum(), parcel.words[0])), non_blocking=True)
            works.append(queue.mark(parcel, lambda report: back.append(struct.unpack("=2q", report))))
    assert back == []  # what is done with them is the outcome of the work
    for work in reversed(works):  # a report outlives its parcel's next use
        work.wait()
        work.result()
    assert back == [(sum(range(size, 2 * size)), size) for size in reversed(sizes)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_parcel_is_lent_again_only_when_its_work_is_done(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = DeviceQueue(torch.device(device))
    with queue.entered():
        first = filled(queue, range(5))
        work = queue.mark(first)
        work.wait()
        with monkeypatch.context() as patch:
            patch.setattr(work, "done", lambda: False)
            second = filled(queue, range(7, 12))
            queue.mark(second).wait()
        assert second is not first
        assert first.words[:5].tolist() == list(range(5))
        assert queue.parcel(5) is first
        assert queue.parcel(1 << 12).capacity == 1 << 12  # the second is too small, and is let go


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_can_be_sent_inside_and_outside_of_inference_mode(device: str) -> None:
    with torch.inference_mode():
        queue = DeviceQueue(torch.device(device))
        with queue.entered():
            parcel = filled(queue, range(5))
            queue.mark(parcel).wait()
    with queue.entered():
        again = filled(queue, range(6))
        assert again is parcel
        queue.mark(again).wait()
    assert again.words[:6].tolist() == list(range(6))


@pytest.mark.parametrize("device", DEVICES)
def test_marked_work_is_done_once_it_was_waited_for(device: str) -> None:
    queue = DeviceQueue(torch.device(device))
    with queue.entered():
        total = torch.ones(1 << 20, device=device).sum()
        work = queue.mark()
    work.wait()
    assert work.done()
    assert total.item() == 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_thread_gets_its_stream_back() -> None:
    queue = DeviceQueue(torch.device("cuda", 0))
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            with queue.entered():
                assert torch.cuda.current_stream() != stream
            assert torch.cuda.current_stream() == stream
