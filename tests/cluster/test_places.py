"""Whether engines have a place: edges, and what is said where they have none."""

import pytest

from graphgen.cluster.places import MachineResources, Needs, check_room, needs_of
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig

BIG = MachineResources("big", 64, 8)
SMALL = MachineResources("small", 8, 2)


def test_an_engine_needs_a_gpu_for_each_rank_or_the_threads_of_the_cpu() -> None:
    assert needs_of(EngineConfig(device="cuda", tensor_parallel=4)) == Needs(1, 4)
    assert needs_of(EngineConfig(device="cpu")) == Needs(1, 0)
    assert needs_of(EngineConfig(device="cpu", tensor_parallel=2, cpu_threads=3)) == Needs(6, 0)


@pytest.mark.parametrize(("ranks", "most"), [(1, 10), (2, 5), (4, 2), (8, 1), (16, 0)])
def test_engines_have_a_place_up_to_what_single_machines_hold(ranks: int, most: int) -> None:
    """Ranks never share two machines: with four, the two GPUs of the small one are of no use."""
    check_room(Needs(1, ranks), most, [BIG, SMALL], 72, 10)
    with pytest.raises(ConfigError, match=f"there is room for {most}: big has 8 GPUs and 64 CPUs; small has 2 GPUs"):
        check_room(Needs(1, ranks), most + 1, [BIG, SMALL], 72, 10)


def test_what_others_use_is_no_room() -> None:
    check_room(Needs(2, 0), 3, [BIG], 6, 8)
    with pytest.raises(ConfigError, match=r"4 engines were asked for, each needs 2 CPUs .* room for 3"):
        check_room(Needs(2, 0), 4, [BIG], 7, 8)
    with pytest.raises(ConfigError, match=r"each needs 1 GPU and 1 CPU on one machine, and there is room for 1"):
        check_room(Needs(1, 1), 2, [BIG], 64, 1)
