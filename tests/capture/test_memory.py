"""A worker that replaces one that died waits until the memory of that one is free."""

import pytest
import torch

from graphgen import ConfigError
from graphgen.capture.memory import device_free_bytes, free_bytes, held_bytes, wait_until_free

GIB = 2**30
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_memory_that_is_still_being_freed_is_waited_for() -> None:
    free = iter([1 * GIB, 3 * GIB, 9 * GIB, 10 * GIB])
    assert wait_until_free(8 * GIB, lambda: next(free), timeout_s=5.0) == 9 * GIB


def test_nothing_is_waited_for_where_nobody_knows_what_is_needed() -> None:
    assert wait_until_free(0, lambda: 0, timeout_s=0.0) == 0


def test_memory_that_another_program_took_is_an_error_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"2\.00 GiB of the device are free after 0\.05 s.* used 8\.00 GiB"):
        wait_until_free(8 * GIB, lambda: 2 * GIB, timeout_s=0.05)


class FakeDevice:
    """A CUDA device with this process's tensors on it, and another process's."""

    def __init__(self, total: int, context: int) -> None:
        self.total, self.context, self.others, self.ours = total, context, 0, 0

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.total - self.context - self.others - self.ours, self.total

    def memory_reserved(self, device: torch.device) -> int:
        return self.ours


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice(80 * GIB, context=GIB // 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", device.mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", device.memory_reserved)
    return device


def start_and_die(device: FakeDevice, others_take: int) -> int:
    """A worker starts while another process takes memory too, and ends: what its successor needs."""
    assert wait_until_free(0, lambda: device_free_bytes(CUDA), timeout_s=0.0) > 0
    device.ours = 30 * GIB
    device.others += others_take
    needed = held_bytes(CUDA)
    device.ours = 0
    return needed


def test_a_successor_needs_what_the_worker_before_it_held_whatever_others_took_meanwhile(
    fake_device: FakeDevice,
) -> None:
    """Two engines that share a device start at the same time: 49.5 GiB are free for the one that is replaced."""
    needed = start_and_die(fake_device, others_take=30 * GIB)
    assert wait_until_free(needed, lambda: device_free_bytes(CUDA), timeout_s=0.0) == int(49.5 * GIB)


def test_a_successor_does_not_take_others_end_for_its_own_memory(fake_device: FakeDevice) -> None:
    fake_device.others = 60 * GIB
    needed = start_and_die(fake_device, others_take=-45 * GIB)
    fake_device.others = 60 * GIB
    with pytest.raises(ConfigError, match=r"19\.50 GiB of the device are free.*used 30\.00 GiB"):
        wait_until_free(needed, lambda: device_free_bytes(CUDA), timeout_s=0.05)


def test_a_share_of_the_device_is_left_alone_whoever_uses_the_rest(fake_device: FakeDevice) -> None:
    fake_device.others = 20 * GIB
    assert free_bytes(CUDA, memory_fraction=0.9) == int(59.5 * GIB) - int(80 * GIB * (1 - 0.9))
    fake_device.others = 75 * GIB
    assert free_bytes(CUDA, memory_fraction=0.9) < 0


def test_the_cpu_reserves_nothing() -> None:
    assert (device_free_bytes(CPU), held_bytes(CPU)) == (0, 0)
