"""The tiles of a mixture of experts in Triton's interpreter: the formula, whichever pairs a tile is made of.

Where a CUDA device is, tests/gpu/test_experts_gpu.py runs the compiled kernel instead: Triton decides when it is
imported whether it interprets, so both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util

import pytest
import torch

from tests.models.expert_cases import CASES, by_hand

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_experts_gpu.py runs the compiled kernel", allow_module_level=True)

from graphgen.models.experts.tiles import (
    MANY_BLOCKS,
    MOST_PAIRS_UNSORTED,
    make_tiles,
    run_in_tiles,
)  # Triton exists where it is installed

# The interpreter computes in numpy, which warns where a kernel means it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_the_formula(case: str) -> None:
    made = CASES[case]()
    torch.testing.assert_close(made.of_experts(run_in_tiles(*made.arguments)), by_hand(made), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_pairs", [1, 64, 65, 200, 1500])
@pytest.mark.parametrize("num_experts", [1, 3, 30])
def test_every_pair_of_an_expert_is_in_one_tile_of_its_expert(num_pairs: int, num_experts: int) -> None:
    experts = torch.randint(0, num_experts + 1, (num_pairs,), generator=torch.Generator().manual_seed(num_pairs))
    tiles = make_tiles(experts, num_experts)
    if num_pairs <= MOST_PAIRS_UNSORTED:
        assert tiles.pairs is None
        assert torch.equal(tiles.experts, experts), "each pair is a tile"
        return
    assert tiles.pairs is not None
    placed = []
    for expert, pairs in zip(tiles.experts.tolist(), tiles.pairs.tolist(), strict=True):
        if expert < num_experts:
            own = [pair for pair in pairs if pair < num_pairs]
            assert own, "no tile of an expert is empty"
            assert all(experts[pair] == expert for pair in own)
            assert pairs[len(own) :] == [num_pairs] * (len(pairs) - len(own))
            placed += own
    assert sorted(placed) == (experts < num_experts).nonzero().flatten().tolist()


def test_many_rows_are_in_large_tiles() -> None:
    assert make_tiles(torch.zeros(200, dtype=torch.int64), 3).blocks == MANY_BLOCKS
