"""A process group of real ranks, over Gloo: what compiled layers make of its sums, and what its ranks agree on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from graphgen.models.collectives.group import RankGroup, is_loss_of_peer
from graphgen.models.collectives.ways import MEASURED, NCCL_ALONE, Ways, ways_of
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import Shard
from tests.models import tiny
from tests.models.driver import Driver
from tests.models.quick_compiler import quick_compiler
from tests.models.splits import run_mixed, tokens

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[RankGroup]:
    """Of one rank: all that there is of a group but the others."""
    yield RankGroup(Shard(0, 1), tmp_path / "ranks", CPU, 10.0)
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["llama", "neox"])
def test_layers_that_add_up_compile_to_one_graph_for_each_half(group: RankGroup, case: str, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    spec = load_spec(tmp_path)

    def logits(ranks: RankGroup | None, compiled: bool) -> torch.Tensor:
        decoder = load_decoder(tmp_path, spec, torch.float32, CPU, ranks=ranks)
        if compiled:
            decoder.compile_layers()
        driver = Driver(decoder)
        found = torch.cat(run_mixed(driver, [driver.request(tokens(length)) for length in (30, 7)], seed=2))
        assert decoder.num_compiled_graphs() == (2 if compiled else 0)
        return found

    with quick_compiler(), torch.inference_mode():
        alone, together = logits(None, False), logits(group, True)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_what_a_group_agrees_on(group: RankGroup) -> None:
    assert (group.least(7), group.most(0.25), group.description) == (7.0, 0.25, "Gloo")
    drawn = torch.tensor([-1, 0, 3, 2**24 - 1], dtype=torch.int32)
    found = group.of_first(drawn)
    assert torch.equal(found, drawn)
    assert found.dtype == torch.int32


def test_only_what_a_lost_rank_leaves_counts_as_its_loss() -> None:
    assert is_loss_of_peer(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_loss_of_peer(dist.DistBackendError("NCCL error"))
    assert not is_loss_of_peer(RuntimeError("a trap in launch"))
    assert not is_loss_of_peer(ValueError("gloo"))


def test_few_bytes_take_one_shot_and_other_numbers_of_ranks_take_nccl() -> None:
    assert ways_of(3) == ways_of(8) == NCCL_ALONE == Ways(0, 0)
    for ways in MEASURED.values():
        assert 0 < ways.one_shot < ways.two_shot
