"""A worker dies on a GPU: the process that stands by has taken no memory of the device, and takes over."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from graphgen import Engine, SamplingParams
from tests.worker_deaths import wait_for

SLACK_BYTES = 64 << 20
"""A context alone takes several times this."""
SAMPLING = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


def cpu_ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def becomes_idle(pid: int) -> bool:
    ticks = cpu_ticks(pid)
    time.sleep(0.5)
    return cpu_ticks(pid) - ticks <= 1


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


@pytest.mark.parametrize("standby", [False, True])
def test_a_standby_takes_over_and_takes_nothing_of_the_device_before(standby: bool) -> None:
    """Prints the pause, to be compared: the imports are what a standby saves."""
    with Engine(device="cuda", max_num_seqs=64, num_pages=400, standby=standby) as engine:
        whole = engine.generate([[5, 6, 7]], SAMPLING)[0].token_ids
        free, pid = free_bytes(), engine.pids["worker-0"]
        if standby:
            wait_for(lambda: "standby-0" in engine.pids, "one stands by")
            pid = engine.pids["standby-0"]
            wait_for(lambda: becomes_idle(pid), "it has imported everything")
            assert abs(free - free_bytes()) < SLACK_BYTES
        stream = engine.stream([5, 6, 7], SAMPLING)
        token_ids = list(next(stream).token_ids)
        os.kill(engine.pids["worker-0"], signal.SIGKILL)
        for piece in stream:
            token_ids += piece.token_ids
        assert len(token_ids) == len(whole)
        assert (engine.pids["worker-0"] == pid) == standby
        print(f"standby {standby}: a pause of {engine.stats().worker_pause_s:.2f} s")
