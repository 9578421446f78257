"""How many KV pages fit: from what the device has left after the weights and the largest step, measured.

Owns the arithmetic and the reading of free memory; allocates nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from graphgen.ipc.errors import ConfigError

CPU_SHARE = 0.25
"""On the CPU the cache may take this share of `memory_fraction` of what is available: other programs live there too."""


def peak_bytes_of(device: torch.device, run: Callable[[], None]) -> int:
    """Device memory that `run` takes at its peak beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return peak - before


FREED_S = 30.0
"""How long the memory of a process that has ended may take to be free."""


def wait_until_free(needed_bytes: int, read_free: Callable[[], int], timeout_s: float = FREED_S) -> int:
    """Free bytes, once there are as many as needed: the driver may still be freeing what a process before this one had.

    needed_bytes: what the process before this one held itself (`held_bytes`). The difference of what was free before
    and after its start would count what other processes of the device took meanwhile, which this one need not wait for.

    Raises ConfigError when there are not within the time: another program has taken it.
    """
    deadline_s = time.monotonic() + timeout_s
    while (free := read_free()) < needed_bytes:
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"{free / 2**30:.2f} GiB of the device are free after {timeout_s:g} s, the worker before this one used"
                f" {needed_bytes / 2**30:.2f} GiB: end what else took memory there, or start an engine with less"
                " memory_fraction or num_pages"
            )
        time.sleep(0.02)
    return free


def device_free_bytes(device: torch.device) -> int:
    """Of a CUDA device, or the part of one (MIG) that this process sees, whoever uses the rest; 0 for the CPU, whose
    memory no worker reserves. This process's context is there by then, or is made now, and is not counted as free."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def held_bytes(device: torch.device) -> int:
    """Of a CUDA device, what this process has taken for tensors and graphs, blocks that are kept for reuse included; 0
    for the CPU. Its context and the code of its kernels come on top of it, some hundred MB."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def unused_bytes(device: torch.device) -> int:
    """Of what this process has taken of a CUDA device, the blocks that are kept for reuse; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def free_bytes(device: torch.device, memory_fraction: float) -> int:
    """What this process may still take when it is to leave `1 - memory_fraction` of the device alone."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - int(total * (1 - memory_fraction))
    return int(_available_host_bytes() * memory_fraction * CPU_SHARE)


def pages_that_fit(budget_bytes: int, bytes_per_page: int, wanted_pages: int, least_pages: int) -> int:
    """KV pages for a budget: no more than can be used at once, and not fewer than one full context needs.

    Raises ConfigError when fewer than `least_pages` fit.
    """
    fitting = budget_bytes // bytes_per_page
    if fitting < least_pages:
        raise ConfigError(
            f"{max(budget_bytes, 0) / 2**30:.2f} GiB are left for the KV cache, one request of max_model_len needs "
            f"{least_pages * bytes_per_page / 2**30:.2f} GiB ({least_pages} pages): lower max_model_len or "
            "token_budget, raise memory_fraction, or use a smaller model"
        )
    return int(min(fitting, wanted_pages))


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable: set num_pages")
