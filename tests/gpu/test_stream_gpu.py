"""The order of what one thread gives a GPU, on the stream and beside it."""

import torch

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
