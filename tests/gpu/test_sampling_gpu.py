"""The Triton kernels on CUDA: the reference's tokens, bit for bit, also in a captured graph, and how long they take."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphgen.ipc.worker_messages import SamplerParams, SlotInit
from graphgen.models.sampling import Sampler, make_sampler, pack_biases, pack_slot, reference
from graphgen.models.sampling.tables import ROW_WIDTH
from tests.models.sampling_cases import (
    MANY_BIASES,
    MIXED,
    STOP_TOKENS,
    biases,
    give_masks,
    own,
    random_masks,
    troubled_logits,
)

CUDA = torch.device("cuda")
NUM_SLOTS = 256


def random_params(rng: random.Random) -> SamplerParams:
    def pick(neutral: float, *others: float) -> float:
        return rng.choice([neutral, neutral, *others])

    return SamplerParams(
        temperature=pick(1.0, 0.0, 0.3, 0.8, 2.5),
        top_k=int(pick(0, 1, 20, 300, 20_000)),
        top_p=pick(1.0, 0.1, 0.9, 0.99),
        min_p=pick(0.0, 0.02, 0.3),
        repetition_penalty=pick(1.0, 1.2, 0.9),
        presence_penalty=pick(0.0, 0.5, -0.5),
        frequency_penalty=pick(0.0, 0.3),
        seed=rng.randrange(2**63),
        biases=biases({rng.randrange(1031): rng.uniform(-5, 5) for _ in range(rng.choice([0, 0, 1, 300]))}),
    )


def make_owned(vocab_size: int, params: list[SamplerParams], min_length: int = 0) -> Sampler:
    sampler = make_sampler(NUM_SLOTS, vocab_size, CUDA)
    own(sampler, params, min_length=min_length)
    sampler.tables.occurrences[:-1].random_(0, 3)
    return sampler


@pytest.mark.parametrize("vocab_size", [1031, 32_000, 128_256])
@pytest.mark.parametrize("num_rows", [12, 64, 256])
def test_kernels_draw_the_tokens_of_the_reference(vocab_size: int, num_rows: int) -> None:
    rng = random.Random(vocab_size + num_rows)
    params = [*MIXED, *(random_params(rng) for _ in range(NUM_SLOTS - len(MIXED)))]
    sampler = make_owned(vocab_size, params, min_length=num_rows // 2)
    for seed in range(2):
        slots = torch.randperm(NUM_SLOTS, device=CUDA)[:num_rows]
        positions = torch.randperm(num_rows, device=CUDA)
        logits = troubled_logits(num_rows, vocab_size, seed).to(CUDA)
        expected = reference.sample(sampler.tables, logits, slots, positions)
        assert torch.equal(sampler.sample(logits, slots, positions), expected)
        narrow = logits.bfloat16()
        expected = reference.sample(sampler.tables, narrow, slots, positions)
        assert torch.equal(sampler.sample(narrow, slots, positions), expected)


@pytest.mark.parametrize("vocab_size", [1031, 32_000, 128_256])
def test_kernels_draw_the_tokens_of_the_reference_under_masks(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    sampler = make_owned(vocab_size, [*MIXED, *(random_params(rng) for _ in range(NUM_SLOTS - len(MIXED)))])
    for seed in range(2):
        allowed = random_masks(NUM_SLOTS, vocab_size, seed)[torch.randperm(NUM_SLOTS)]
        slots = torch.randperm(NUM_SLOTS, device=CUDA)
        positions = torch.randperm(NUM_SLOTS, device=CUDA)
        of_slots = torch.zeros_like(slots).index_copy(0, slots, positions).cpu()
        give_masks(sampler, allowed, torch.where(torch.rand(NUM_SLOTS) < 0.5, of_slots, -1))
        logits = troubled_logits(NUM_SLOTS, vocab_size, seed).to(CUDA)
        expected = reference.sample(sampler.tables, logits, slots, positions)
        assert torch.equal(sampler.sample(logits, slots, positions), expected)


def test_the_reference_draws_the_same_tokens_on_the_cpu() -> None:
    vocab_size = 4099
    rng = random.Random(7)
    sampler = make_owned(vocab_size, [random_params(rng) for _ in range(NUM_SLOTS)])
    host = make_sampler(NUM_SLOTS, vocab_size, torch.device("cpu"))
    host.tables.settings.copy_(sampler.tables.settings)
    host.tables.biases.copy_(sampler.tables.biases)
    host.tables.occurrences.copy_(sampler.tables.occurrences)
    slots, positions = torch.arange(NUM_SLOTS), torch.arange(NUM_SLOTS) + 9
    logits = troubled_logits(NUM_SLOTS, vocab_size, seed=3)
    drawn = sampler.sample(logits.to(CUDA), slots.to(CUDA), positions.to(CUDA))
    assert drawn.tolist() == host.sample(logits, slots, positions).tolist()


def test_a_captured_graph_follows_changing_tables() -> None:
    """Owners, tokens and logits change between replays; tables and tokens stay those of the reference."""
    vocab_size, num_rows, num_inputs, num_chunks = 32_000, 64, 200, 16
    rng = random.Random(11)
    sampler, expected = make_sampler(NUM_SLOTS, vocab_size, CUDA), make_sampler(NUM_SLOTS, vocab_size, CUDA)
    rows = torch.zeros(num_chunks * ROW_WIDTH, dtype=torch.int32, device=CUDA)
    chunk_slots = torch.zeros(num_chunks, dtype=torch.int64, device=CUDA)
    inits = torch.zeros(num_chunks, dtype=torch.int32, device=CUDA)
    token_ids, input_slots, input_positions = torch.zeros(3, num_inputs, dtype=torch.int64, device=CUDA)
    logits = torch.zeros(num_rows, vocab_size, device=CUDA)
    slots, positions = torch.zeros(2, num_rows, dtype=torch.int64, device=CUDA)

    def step() -> Tensor:
        sampler.write_slots(rows, chunk_slots, inits)
        sampler.count_inputs(token_ids, input_slots, input_positions)
        return sampler.sample(logits, slots, positions)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    sampler.tables.settings.copy_(expected.tables.settings)
    sampler.tables.occurrences.zero_()
    for seed in range(12):
        owners = [random_params(rng) for _ in range(num_chunks)]
        packed = [pack_slot(SlotInit(rng.randrange(40), 30, STOP_TOKENS, owner), vocab_size) for owner in owners]
        biased = torch.stack([torch.from_numpy(pack_biases(owner)) for owner in owners]).to(CUDA)
        rows.copy_(torch.stack([torch.from_numpy(row) for row in packed]).flatten())
        chunk_slots.copy_(torch.randperm(num_rows)[:num_chunks])
        inits.random_(0, 2)
        for one in (sampler, expected):
            one.write_biases(chunk_slots[inits != 0], biased[inits != 0])
        token_ids.random_(0, 50)
        input_slots.random_(0, num_rows)
        input_slots[150:] = sampler.tables.trash_slot
        input_positions.random_(0, 60)
        slots.copy_(torch.randperm(num_rows))
        positions.random_(0, 60)
        logits.copy_(troubled_logits(num_rows, vocab_size, seed))
        graph.replay()
        reference.write_slots(expected.tables, rows.view(-1, ROW_WIDTH), chunk_slots, inits)
        reference.count_inputs(expected.tables, token_ids, input_slots, input_positions)
        assert torch.equal(sampler.tables.settings, expected.tables.settings)
        assert torch.equal(sampler.tables.occurrences, expected.tables.occurrences)
        assert torch.equal(tokens, reference.sample(expected.tables, logits, slots, positions))


def median_us(work: Callable[[], object], repeats: int = 60) -> float:
    """Median time of one run of `work`, from replays of a graph that holds four."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = sorted(begin.elapsed_time(end) for begin, end in events)
    return milliseconds[repeats // 2] * 1000 / 4


def time_draws(params: SamplerParams, vocab_size: int, num_rows: int) -> float:
    """A draw of rows that all have these parameters, over logits as a model gives them: most far below the best."""
    sampler = make_owned(vocab_size, [params] * NUM_SLOTS)
    logits = torch.randn(num_rows, vocab_size, device=CUDA) * 2.5
    logits[:, :50] += 8.0
    slots = torch.arange(num_rows, device=CUDA)
    return median_us(lambda: sampler.sample(logits, slots, slots))


def test_greedy_costs_little_more_than_reading_the_logits(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the time of every kind of draw; holds the greedy one to twice torch's sum of the same logits."""
    vocab_size, row_counts = 128_256, (1, 64, 256)
    kinds = {
        "greedy": SamplerParams(),
        "greedy, penalties": SamplerParams(repetition_penalty=1.1),
        "greedy, 1024 biases": SamplerParams(biases=biases(MANY_BIASES)),
        "temperature": SamplerParams(temperature=0.8, seed=1),
        "top-k 20, top-p 0.8": SamplerParams(temperature=0.7, top_k=20, top_p=0.8, seed=1),
        "top-p 0.9": SamplerParams(temperature=0.6, top_p=0.9, seed=1),
        "min-p 0.05": SamplerParams(temperature=1.0, min_p=0.05, seed=1),
        "top-p 0.9, flat logits": SamplerParams(temperature=40.0, top_p=0.9, seed=1),
    }
    times = {(name, n): time_draws(params, vocab_size, n) for name, params in kinds.items() for n in row_counts}
    logits = torch.randn(256, vocab_size, device=CUDA)
    reading = median_us(lambda: logits.sum())
    sampler = make_sampler(NUM_SLOTS, vocab_size, CUDA)
    inputs = torch.arange(2048, device=CUDA)
    counting = median_us(lambda: sampler.count_inputs(inputs, inputs % NUM_SLOTS, inputs))
    rows = torch.zeros(32 * ROW_WIDTH, dtype=torch.int32, device=CUDA)
    chunk_slots, inits = torch.arange(32, device=CUDA), torch.zeros(32, dtype=torch.int32, device=CUDA)
    writing = median_us(lambda: sampler.write_slots(rows, chunk_slots, inits))
    with capsys.disabled():
        print(f"\nus a draw, {vocab_size} tokens, on {torch.cuda.get_device_name()}; rows: {row_counts}")
        for name in kinds:
            print(f"  {name:24}" + "".join(f"{times[name, n]:9.1f}" for n in row_counts))
        print(f"  torch's sum of 256 rows {reading:.1f}")
        print(f"  count_inputs of 2048 {counting:.1f}; write_slots of 32 chunks, none with a new owner {writing:.1f}")
    assert times["greedy", 256] < 2 * reading
