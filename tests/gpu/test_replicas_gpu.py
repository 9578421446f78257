"""Two engines on two GPUs: each has its own, a killed one's requests go on at the other, and one that drained has left
its GPU."""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
import torch

from graphgen import Engine, SamplingParams
from tests.worker_deaths import Reader, wait_for

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; runs where they are")

PROMPTS = [[1 + number, 5, 6] * 20 for number in range(32)]
SAMPLING = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0.0)
CONTEXT_BYTES = 200 << 20
"""Less than the context of a process takes."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(device="cuda", replicas=2, max_num_seqs=64, num_pages=800, standby=False) as engine:
        yield engine


def used_bytes(device: int) -> int:
    """Of the whole GPU, by all processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def test_each_engine_has_a_gpu_of_its_own(engine: Engine) -> None:
    engine.generate(PROMPTS, SAMPLING)
    finished = [0 if one is None else one.finished for one in engine.stats().engines]
    assert sum(finished) == len(PROMPTS)
    assert min(finished) >= len(PROMPTS) // 3
    listed = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout
    found = dict(line.split(", ") for line in listed.splitlines())
    workers = [str(engine.pids[f"engine-{number}/worker-0"]) for number in (0, 1)]
    if all(pid in found for pid in workers):  # a container may have other process ids than the driver
        assert found[workers[0]] != found[workers[1]]


@pytest.mark.parametrize("process", ["scheduler", "worker-0"])
def test_the_requests_of_a_killed_engine_go_on(engine: Engine, process: str) -> None:
    readers = [Reader(engine, prompt, SAMPLING) for prompt in PROMPTS]
    wait_for(lambda: all(reader.token_ids for reader in readers), "first tokens")
    had = [list(reader.token_ids) for reader in readers]
    os.kill(engine.pids[f"engine-1/{process}"], signal.SIGKILL)
    for reader, begun in zip(readers, had, strict=True):
        reader.thread.join(120)
        assert reader.error is None
        assert len(reader.token_ids) == SAMPLING.max_tokens
        assert reader.token_ids[: len(begun)] == begun
    wait_for(lambda: None not in engine.stats().engines, "both serve again")


def num_finished(engine: Engine, number: int) -> int:
    report = engine.stats().engines[number]
    return 0 if report is None else report.finished


def test_an_engine_that_drained_has_left_its_gpu_and_comes_back(engine: Engine) -> None:
    finished = num_finished(engine, 1)
    while num_finished(engine, 1) == finished:  # its worker, which was killed, is back
        engine.generate(PROMPTS, SAMPLING)
    before = used_bytes(1)
    engine.drain(1, grace_s=1.0)
    assert used_bytes(1) < before - CONTEXT_BYTES, "weights, pages and the worker's context are gone"
    assert len(engine.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    engine.resume(1)
    assert None not in engine.stats().engines
    assert engine.stats().eager_steps == 0
