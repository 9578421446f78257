"""The Triton kernels in Triton's interpreter: the tokens and tables of the torch reference, bit for bit.

Where a CUDA device is, tests/gpu/test_sampling_gpu.py runs the compiled kernels instead: Triton decides when it is
imported whether it interprets, so both cannot be had in one process. tests/conftest.py tells it to.
"""

import importlib.util

import pytest
import torch

from graphgen.ipc.worker_messages import SamplerParams, SlotInit
from graphgen.models.sampling import Sampler, make_sampler, pack_slot, reference
from tests.models.sampling_cases import MIXED, give_masks, own, random_masks, troubled_logits

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; comes with torch for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_sampling_gpu.py runs the compiled kernels", allow_module_level=True)

from graphgen.models.sampling import kernels  # Triton exists where it is installed

CPU = torch.device("cpu")
# The interpreter computes in numpy, which warns where the kernels mean it: beyond the largest float, inf minus inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_owned(vocab_size: int, min_length: int) -> Sampler:
    """One slot for each of MIXED, with random occurrences."""
    sampler = make_sampler(len(MIXED), vocab_size, CPU)
    own(sampler, list(MIXED), min_length=min_length)
    shape = (len(MIXED), vocab_size)
    sampler.tables.occurrences[:-1] = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(vocab_size))
    return sampler


@pytest.mark.parametrize(
    ("vocab_size", "candidates"),
    [(257, 8192), (1000, 16), (2100, 128)],
    ids=["one tile", "candidates overflow", "several parts"],
)
def test_kernels_draw_the_tokens_of_the_reference(vocab_size: int, candidates: int) -> None:
    sampler = make_owned(vocab_size, min_length=8)
    logits = troubled_logits(2 * len(MIXED), vocab_size, seed=vocab_size)
    # Each kind of row meets each kind of logits only over several shifts; two keep the test short.
    slots = torch.cat([torch.arange(len(MIXED)), torch.arange(len(MIXED)).roll(5)])
    positions = torch.arange(len(slots)) + 4
    expected = reference.sample(sampler.tables, logits, slots, positions)
    assert torch.equal(kernels.sample(sampler.tables, logits, slots, positions, candidates), expected)


@pytest.mark.parametrize(("vocab_size", "candidates"), [(257, 8192), (1100, 16)])
def test_kernels_draw_the_tokens_of_the_reference_under_masks(vocab_size: int, candidates: int) -> None:
    sampler = make_owned(vocab_size, min_length=8)
    logits = troubled_logits(2 * len(MIXED), vocab_size, seed=vocab_size)
    slots = torch.cat([torch.arange(len(MIXED)), torch.arange(len(MIXED)).roll(5)])
    positions = torch.arange(len(slots)) + 4
    without = reference.sample(sampler.tables, logits, slots, positions)
    masked = torch.where(torch.arange(len(MIXED)) % 5 != 4, positions[: len(MIXED)], -1)
    for shift in range(2):
        give_masks(sampler, random_masks(len(MIXED), vocab_size, seed=shift).roll(shift, 0), masked)
        expected = reference.sample(sampler.tables, logits, slots, positions)
        assert not torch.equal(expected, without)
        assert torch.equal(kernels.sample(sampler.tables, logits, slots, positions, candidates), expected)


def test_kernels_count_and_write_slots_as_the_reference_does() -> None:
    vocab_size, num_slots = 50, 4
    found, expected = make_sampler(num_slots, vocab_size, CPU), make_sampler(num_slots, vocab_size, CPU)
    trash = found.tables.trash_slot
    generator = torch.Generator().manual_seed(9)
    for step in range(4):
        rows = torch.stack(
            [
                torch.from_numpy(pack_slot(SlotInit(5 + slot, step, (slot,), SamplerParams(seed=step)), vocab_size))
                for slot in range(3)
            ]
        )
        inits = torch.tensor([step == 0, step == 2, step == 0], dtype=torch.int32)
        chunk_slots = torch.tensor([2, 0, 3])
        token_ids = torch.randint(6, (300,), generator=generator)  # few tokens: many meet in one entry
        token_ids[::50] += vocab_size  # of rows that mean nothing, as a prompt may have them
        slots = torch.randint(num_slots + 1, (300,), generator=generator)
        positions = torch.where(slots == trash, 0, torch.randint(20, (300,), generator=generator))
        for functions, sampler in ((kernels, found), (reference, expected)):
            functions.write_slots(sampler.tables, rows, chunk_slots, inits)
            functions.count_inputs(sampler.tables, token_ids, slots, positions)
        assert torch.equal(found.tables.settings, expected.tables.settings)
        assert torch.equal(found.tables.occurrences, expected.tables.occurrences)
    assert int(expected.tables.occurrences.max()) > 3


@pytest.mark.parametrize("num_masks", [1, 3])
def test_kernels_write_masks_as_the_reference_does(num_masks: int) -> None:
    """Of a block that is longer, whose other words mean nothing."""
    vocab_size = 2100
    block = torch.randint(-(2**31), 2**31 - 1, (300,), generator=torch.Generator().manual_seed(3)).int()
    block[:num_masks] = torch.tensor([4, 0, 2])[:num_masks]
    block[num_masks : 2 * num_masks] = torch.tensor([7, -1, 0])[:num_masks]
    wanted, found = make_owned(vocab_size, 8).tables, make_owned(vocab_size, 8).tables
    reference.write_masks(wanted, block, num_masks)
    kernels.write_masks(found, block, num_masks)
    assert torch.equal(found.masks, wanted.masks)
    assert torch.equal(found.masked, wanted.masked)
    assert int(found.masked.count_nonzero()) == len({7, 0} & {*block[num_masks : 2 * num_masks].tolist()})
