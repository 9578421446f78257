"""The tiles of a mixture of experts in Triton's interpreter: the formula, whichever pairs a tile is made of.

Where a CUDA device is, tests/gpu/test_experts_gpu.py runs the compiled kernel instead: Triton decides when it is
imported whether it interprets, so both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util

import pytest
import torch

from graphgen.models.experts.operator import run_experts
from graphgen.models.spec.formats import LinearFormat
from tests.models.expert_cases import CASES, by_hand, make, quantised_like
from tests.models.format_cases import FORMATS

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


STORED = "fp8 (fp8 input)", "fp8 128x128 (fp8 input)", "int8 g128", "int4 g32 with zeros", "int4 g128", "int4"


@pytest.mark.parametrize("form", [FORMATS[name] for name in STORED], ids=lambda form: form.name)
def test_quantised_weights_mean_what_their_format_says(form: LinearFormat) -> None:
    """3 rows have a tile each, 65 share three. No size is a multiple of 64 or 128 where the format lets it be none."""
    for rows in (3, 65):
        hidden, size = (96, 160) if form.rows == 1 else (128, 128)
        plain = make(rows, 2, 1, hidden, size, biases=True, every_third_row_dead=True)
        quantised, meant = quantised_like(plain, form)
        got, want = (
            plain.of_experts(run_in_tiles(*quantised.arguments)),
            plain.of_experts(run_experts(*meant.arguments)),
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.std()))


def test_groups_that_no_tile_fits_are_refused() -> None:
    form = LinearFormat(storage="int4", group=24)
    quantised, _ = quantised_like(make(2, hidden=96, size=96), form)
    with pytest.raises(ValueError, match="int4 g24 of 96 columns has groups that no tile fits"):
        run_in_tiles(*quantised.arguments)


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
