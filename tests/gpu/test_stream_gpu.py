"""The order of what one thread gives a GPU, on the stream and beside it."""

import time

import pytest
import torch

from graphgen.capture import device_clock
from graphgen.capture.stream import CudaStream

LONG_CYCLES = 1_000_000_000
"""Half a second of an H200: longer than any host takes to queue what follows."""


def test_submitted_work_reads_what_its_thread_made_before() -> None:
    """A table whose filling waits behind something long, as behind the zeroing of 100 GB of pages."""
    device = torch.device("cuda")
    stream = CudaStream(device)
    try:
        seen = torch.zeros(1000, dtype=torch.int32, device=device)
        torch.cuda._sleep(LONG_CYCLES)
        table = torch.full((1000,), 7, dtype=torch.int32, device=device)

        def read() -> None:
            seen.copy_(table)

        stream.submit(read)
        stream.synchronize()
        assert seen.tolist() == [7] * 1000
    finally:
        stream.close()
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def test_steps_are_as_long_by_any_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mark that is waited for is the origin of those that are made afterwards."""
    monkeypatch.setattr(device_clock, "RENEWED_AFTER_S", 0.0)
    stream = CudaStream(torch.device("cuda"))
    try:
        begun_s, lengths_s, ended_s = time.monotonic(), [], 0.0
        for number in range(40):
            if number == 20:
                monkeypatch.setattr(device_clock, "STALE_AFTER_S", 0.0)  # from here on one is made for each
            started = stream.mark()
            stream.submit(lambda: torch.cuda._sleep(LONG_CYCLES // 100))
            finished = stream.mark()
            stream.fetch(torch.ones(1, device="cuda"), torch.empty(1, pin_memory=True)).wait()
            times_s = started.wait(), finished.wait()
            assert ended_s - 1e-3 < times_s[0] < times_s[1] < time.monotonic() + 1e-3
            lengths_s.append(times_s[1] - times_s[0])
            ended_s = times_s[1]
        assert begun_s < ended_s
        usual_s = sorted(lengths_s)[20]
        assert 2e-3 < usual_s < 20e-3
        assert sum(abs(length_s - usual_s) < 0.1 * usual_s for length_s in lengths_s) > 30
    finally:
        stream.close()
