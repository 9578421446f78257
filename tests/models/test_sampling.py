"""Sampling in torch: Hugging Face's supports and probabilities, exact counts, draws that depend on nothing else."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.worker_messages import SamplerParams, SlotInit
from graphgen.models.sampling import NO_TOKEN, ROW_WIDTH, Sampler, make_sampler, pack_biases, pack_slot
from graphgen.models.sampling.arithmetic import exp_not_positive, gumbel, log_positive
from graphgen.models.sampling.philox import philox4x32
from graphgen.models.sampling.reference import kept_logits, penalised_logits
from graphgen.models.sampling.tables import IN_PROMPT, OUTPUT_COUNT_MASK
from tests.models.sampling_cases import MIXED, STOP_TOKENS, biases, give_masks, own, random_masks, troubled_logits

CPU = torch.device("cpu")
BIASES = {0: 4.5, 17: -100.0, 500: 2.25, 1002: 100.0}


def make_owned(params: list[SamplerParams], vocab_size: int, prompt_len: int = 3, min_length: int = 0) -> Sampler:
    sampler = make_sampler(len(params), vocab_size, CPU)
    own(sampler, params, prompt_len, min_length)
    return sampler


def probabilities(sampler: Sampler, logits: Tensor) -> Tensor:
    slots = torch.zeros(len(logits), dtype=torch.int64)
    scores = penalised_logits(sampler.tables, logits, slots, slots + 100)
    temperature = sampler.tables.temperature[slots].unsqueeze(1)
    return (kept_logits(sampler.tables, scores, slots) / temperature).softmax(1)


# --- Arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([value]) for value in counter)
    k0, k1 = (torch.tensor([value]) for value in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == words


def test_logarithm_and_exponential_are_accurate() -> None:
    values = torch.exp(torch.linspace(-60, 60, 200_001)).float()
    exact = values.double().log()
    assert ((log_positive(values) - exact).abs() <= 2.5e-7 * exact.abs().clamp(min=1e-30)).all()
    exponents = -torch.linspace(0, 86, 200_001)
    exact = exponents.double().exp()
    assert ((exp_not_positive(exponents) - exact).abs() <= 2e-7 * exact).all()
    assert exp_not_positive(torch.tensor([0.0, -88.0, -torch.inf])).tolist() == [1.0, 0.0, 0.0]


def test_noise_is_gumbel_and_finite_at_both_ends() -> None:
    bits = torch.arange(0, 2**32, 65_537)
    uniform = (bits.double() + 0.5) / 2**32
    exact = -(-torch.log1p(-uniform)).log()
    assert (gumbel(bits) - exact)[:-1].abs().max() < 4e-6
    ends = gumbel(torch.tensor([0, 2**32 - 1]))
    assert ends[0] == pytest.approx(22.873857, abs=1e-5)
    assert ends.isfinite().all()


# --- Rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplerParams(temperature=0.7),
        SamplerParams(temperature=1.0, top_k=1),
        SamplerParams(temperature=1.5, top_k=40),
        SamplerParams(temperature=0.6, top_p=0.9),
        SamplerParams(temperature=1.0, top_p=0.2),
        SamplerParams(temperature=0.6, top_k=20, top_p=0.8),
        SamplerParams(temperature=1.0, min_p=0.05),
        SamplerParams(temperature=1.2, top_k=100, top_p=0.95, min_p=0.02, repetition_penalty=1.3),
        SamplerParams(temperature=0.9, top_k=5000, repetition_penalty=0.8),
        SamplerParams(temperature=0.9, top_p=0.9, repetition_penalty=1.4, biases=biases(BIASES)),
    ],
)
def test_probabilities_equal_hugging_face(params: SamplerParams) -> None:
    vocab_size, num_rows = 1003, 16
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(vocab_size, (30,), generator=generator)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    sampler = make_owned([params], vocab_size, prompt_len=20)
    sampler.count_inputs(prompt, torch.zeros(30, dtype=torch.int64), torch.arange(30))

    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.repetition_penalty != 1:  # the last to be inserted comes first
        processors.insert(0, RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.biases:
        processors.insert(0, SequenceBiasLogitsProcessor({(token,): bias for token, bias in BIASES.items()}))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    expected = processors(prompt.repeat(num_rows, 1), logits.clone()).softmax(1)

    found = probabilities(sampler, logits)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_top_k_keeps_ties_like_hugging_face() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    sampler = make_owned([SamplerParams(temperature=1.0, top_k=2)], 6)
    expected = TopKLogitsWarper(2)(torch.zeros(1, 1), logits.clone())
    assert torch.equal(probabilities(sampler, logits) > 0, expected.isfinite())


@given(
    values=st.lists(st.integers(-12, 6), min_size=2, max_size=24),
    top_k=st.integers(0, 30),
    top_p=st.floats(1 / 128, 1.0, width=32),
    min_p=st.one_of(st.just(0.0), st.floats(1 / 1024, 1.0, width=32)),
)
@settings(max_examples=150)
def test_kept_tokens_are_those_of_the_definition(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    """Against the rules spelled out one token at a time, many ties included."""
    params = SamplerParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.tensor([values]).float() / 3
    probability = np.exp(np.array(values) / 3)
    kth = sorted(values, reverse=True)[min(top_k, len(values)) - 1] if top_k else min(values)
    first = [value >= kth for value in values]
    total = sum(p for p, kept in zip(probability, first, strict=True) if kept)
    expected: list[bool | None] = []
    for value, own_probability, kept in zip(values, probability, first, strict=True):
        likelier = sum(p for p, other in zip(probability, values, strict=True) if other > value)
        relative = own_probability / max(probability)
        if likelier == 0 or not kept:
            expected.append(kept)
        elif abs(likelier / total - top_p) < 1e-6 or abs(relative - min_p) < 1e-5:
            expected.append(None)  # on the edge of a real number: either is right
        else:
            expected.append(relative >= min_p and likelier < top_p * total)
    found = (probabilities(make_owned([params], len(values)), logits)[0] > 0).tolist()
    assert [f for f, e in zip(found, expected, strict=True) if e is not None] == [e for e in expected if e is not None]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    params = SamplerParams(presence_penalty=0.5, frequency_penalty=0.25)
    sampler = make_owned([params], 8, prompt_len=2)
    tokens = torch.tensor([6, 6, 3, 3, 3, 5])
    sampler.count_inputs(tokens, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    found = penalised_logits(sampler.tables, torch.zeros(1, 8), torch.tensor([0]), torch.tensor([6]))
    assert found[0].tolist() == [0, 0, 0, -1.25, 0, -0.75, 0, 0]


def test_greedy_takes_the_lowest_of_equal_tokens_after_penalties() -> None:
    sampler = make_owned([SamplerParams(), SamplerParams(frequency_penalty=1.0)], 16)
    sampler.count_inputs(torch.tensor([9]), torch.tensor([1]), torch.tensor([5]))
    logits = torch.zeros(2, 16)
    logits[:, [9, 12, 15]] = 2.0
    assert sampler.sample(logits, torch.tensor([0, 1]), torch.tensor([6, 6])).tolist() == [9, 12]


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5, "min_p": 0.9}], ids=str
)
def test_a_tiny_temperature_draws_what_greedy_takes(filters: dict[str, Any]) -> None:
    """Down to the smallest float32, below which a temperature is 0: no division makes all good tokens equal."""
    logits = torch.randn(64, 301, generator=torch.Generator().manual_seed(5)) * 12
    logits[:8] = logits[:8].bfloat16().float() - 40
    smallest = 1.4e-45
    temperatures = (0.0, smallest, 1e-40, 1e-38, 1e-37, 1e-30, 1e-9)
    sampler = make_owned([SamplerParams(temperature=t, seed=3, **filters) for t in temperatures], 301)
    greedy, *drawn = (
        sampler.sample(logits, torch.full((64,), slot), torch.arange(64)) for slot in range(len(temperatures))
    )
    assert (sampler.tables.temperature[1:] > 0).sum() >= len(drawn)
    assert torch.equal(greedy.long(), logits.argmax(1))
    for tokens in drawn:
        assert torch.equal(tokens, greedy)


def test_stop_tokens_wait_for_the_minimum_length() -> None:
    sampler = make_owned([SamplerParams(), SamplerParams(temperature=1.0)], 8, min_length=10)
    logits = torch.zeros(4, 8)
    logits[:, STOP_TOKENS[0]] = 9.0
    logits[:, 4] = 5.0
    slots = torch.tensor([0, 0, 0, 1])
    kept = penalised_logits(sampler.tables, logits, slots, torch.tensor([5, 9, 10, 9]))
    for row, removed in zip(kept, [set(STOP_TOKENS), set(STOP_TOKENS), set(), set(STOP_TOKENS)], strict=True):
        assert set(row.isinf().nonzero().flatten().tolist()) == removed
    assert sampler.sample(logits, slots, torch.tensor([5, 9, 10, 9])).tolist()[:3] == [4, 4, STOP_TOKENS[0]]


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over 20 000 positions of one seed: 99.9 % quantile for 11 degrees of freedom."""
    vocab_size, num_draws = 13, 20_000
    logits = torch.linspace(-2, 2, vocab_size)
    params = SamplerParams(temperature=1.4, top_k=12, seed=1234)
    sampler = make_owned([params], vocab_size)
    expected = probabilities(sampler, logits.unsqueeze(0))[0].double() * num_draws
    slots = torch.zeros(num_draws, dtype=torch.int64)
    tokens = sampler.sample(logits.repeat(num_draws, 1), slots, torch.arange(num_draws))
    counts = tokens.bincount(minlength=vocab_size).double()
    assert counts[0] == 0
    assert ((counts - expected) ** 2 / expected)[1:].sum() < 31.26


def test_draws_of_different_seeds_are_unrelated() -> None:
    params = [SamplerParams(temperature=1.0, seed=seed) for seed in (1, 2, 1 + 2**32)]
    sampler = make_owned(params, 64)
    positions = torch.arange(1000)
    draws = [sampler.sample(torch.zeros(1000, 64), torch.full((1000,), slot), positions) for slot in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 2 <= int((draws[one] == draws[other]).sum()) <= 40  # 15.6 expected


# --- Independence ----------------------------------------------------------------------------------------------


def test_a_draw_is_the_same_alone_and_in_a_mixed_batch_in_any_slot() -> None:
    vocab_size = 257
    logits = troubled_logits(len(MIXED), vocab_size, seed=2)
    positions = torch.arange(len(MIXED)) * 3 + 5
    together = make_owned(list(MIXED), vocab_size, min_length=12)
    order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(3))
    mixed = together.sample(logits[order], order, positions[order])
    for row, slot in zip(mixed.tolist(), order.tolist(), strict=True):
        alone = make_owned([SamplerParams(temperature=1.0), MIXED[slot]], vocab_size, min_length=12)
        drawn = alone.sample(logits[slot : slot + 1], torch.tensor([1]), positions[slot : slot + 1])
        assert drawn.tolist() == [row]


def test_troubled_rows_draw_valid_tokens_from_what_is_left() -> None:
    vocab_size = 100
    logits = troubled_logits(12, vocab_size, seed=4)
    for params in MIXED:
        sampler = make_owned([params], vocab_size)
        tokens = sampler.sample(logits, torch.zeros(12, dtype=torch.int64), torch.arange(12) + 9)
        undrawable = torch.tensor([row in (3, 4) for row in range(12)])
        assert (tokens[undrawable] == NO_TOKEN).all(), "all NaN, all -inf"
        assert ((tokens >= 0) & (tokens < vocab_size))[~undrawable].all()
        assert tokens[5] >= vocab_size // 2
        assert tokens[6] == vocab_size // 3
        assert tokens[7] < vocab_size // 3


def test_a_row_whose_only_numbers_are_banned_stop_tokens_has_no_token() -> None:
    sampler = make_sampler(1, 16, CPU)
    own(sampler, [SamplerParams()], min_length=5)
    logits = torch.full((1, 16), float("nan"))
    logits[0, STOP_TOKENS[0]] = 1.0
    drawn = [sampler.sample(logits, torch.tensor([0]), torch.tensor([position])).item() for position in (4, 5)]
    assert drawn == [NO_TOKEN, STOP_TOKENS[0]]


def test_padded_rows_leave_no_trace() -> None:
    sampler = make_owned([SamplerParams(repetition_penalty=2.0)], 16)
    trash = sampler.tables.trash_slot
    sampler.count_inputs(torch.tensor([3, 3]), torch.tensor([trash, trash]), torch.tensor([0, 0]))
    assert not sampler.tables.occurrences.any()


def test_columns_past_the_vocabulary_are_never_drawn_and_change_no_draw() -> None:
    """Tables of embeddings are longer than the tokenizer's vocabulary."""
    vocab_size = 100
    logits = troubled_logits(len(MIXED), vocab_size, seed=6)
    padded = torch.cat((logits, torch.full((len(MIXED), 28), 1e9)), dim=1)
    sampler = make_owned(list(MIXED), vocab_size)
    slots, positions = torch.arange(len(MIXED)), torch.arange(len(MIXED)) + 4
    expected = sampler.sample(logits, slots, positions)
    before = sampler.tables.occurrences.clone()
    sampler.count_inputs(torch.tensor([100, 127]), torch.tensor([0, 1]), torch.tensor([0, 30]))
    assert torch.equal(sampler.tables.occurrences, before)
    assert torch.equal(sampler.sample(padded, slots, positions), expected)


def test_logits_are_left_as_they_are_and_bfloat16_is_computed_in_float32() -> None:
    sampler = make_owned(list(MIXED), 257)
    logits = troubled_logits(len(MIXED), 257, seed=6).bfloat16()
    before = logits.clone()
    slots, positions = torch.arange(len(MIXED)), torch.arange(len(MIXED)) + 4
    drawn = sampler.sample(logits, slots, positions)
    assert torch.equal(logits.view(torch.int16), before.view(torch.int16))
    assert torch.equal(drawn, sampler.sample(logits.float(), slots, positions))


# --- Slots and counts ------------------------------------------------------------------------------------------


def test_counts_are_exact_through_chunks_decodes_and_recomputation() -> None:
    """Random requests over few slots, chunked, preempted and replaced, against a Counter per request."""
    rng = random.Random(5)
    vocab_size, num_slots = 7, 3
    sampler = make_sampler(num_slots, vocab_size, CPU)
    trash = sampler.tables.trash_slot
    prompts: dict[int, list[int]] = {}
    outputs: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    for _ in range(120):
        inits, rows = [], []
        token_ids, slots, positions = [], [], []
        for slot in range(num_slots):
            if slot not in prompts or rng.random() < 0.05:
                prompts[slot] = rng.choices(range(vocab_size), k=rng.randint(1, 12))
                outputs[slot], computed[slot] = [], 0
            elif rng.random() < 0.05:
                computed[slot] = 0  # preempted: prompt and output are computed again
            known = prompts[slot] + outputs[slot]
            inits.append(int(computed[slot] == 0))
            rows.append(pack_slot(SlotInit(len(prompts[slot]), 0, (), SamplerParams()), vocab_size))
            for _ in range(rng.randint(1, 6)):
                if computed[slot] == len(known):
                    break
                token_ids.append(known[computed[slot]])
                slots.append(slot)
                positions.append(computed[slot])
                computed[slot] += 1
            if computed[slot] == len(known):
                outputs[slot].append(rng.randrange(vocab_size))
        padding = rng.randint(0, 3)
        sampler.write_slots(
            torch.from_numpy(np.stack(rows)).flatten(), torch.arange(num_slots), torch.tensor(inits, dtype=torch.int32)
        )
        sampler.count_inputs(
            torch.tensor(token_ids + [1] * padding),
            torch.tensor(slots + [trash] * padding),
            torch.tensor(positions + [0] * padding),
        )
        for slot in range(num_slots):
            inputs = (prompts[slot] + outputs[slot])[: computed[slot]]
            counted = Counter(inputs[len(prompts[slot]) :])
            entries = sampler.tables.occurrences[slot]
            assert (entries & OUTPUT_COUNT_MASK).tolist() == [counted[token] for token in range(vocab_size)]
            seen = set(inputs[: len(prompts[slot])])
            assert ((entries & IN_PROMPT) != 0).tolist() == [token in seen for token in range(vocab_size)]


def test_a_packed_row_reads_back_through_the_tables() -> None:
    params = SamplerParams(0.7, 40, 0.9, 0.05, 1.1, 0.2, -0.3, 2**63 - 1)
    sampler = make_sampler(2, 50, CPU)
    init = SlotInit(prompt_len=11, min_length=17, stop_token_ids=(4, 49, 50, 999), sampler=params)
    sampler.write_slots(torch.from_numpy(pack_slot(init, 50)), torch.tensor([1]), torch.tensor([1]))
    tables = sampler.tables
    floats = (tables.temperature, tables.top_p, tables.min_p, tables.repetition, tables.presence, tables.frequency)
    assert [float(column[1]) for column in floats] == pytest.approx([0.7, 0.9, 0.05, 1.1, 0.2, -0.3])
    assert [int(column[1]) for column in (tables.top_k, tables.seed, tables.prompt_len, tables.min_length)] == [
        40,
        2**63 - 1,
        11,
        17,
    ]
    assert tables.stop_token_ids[1].tolist() == [4, 49] + [50] * 14
    assert torch.equal(tables.settings[0], tables.settings[2])


def test_a_new_owner_has_no_biases_of_the_old_one() -> None:
    sampler = make_owned([SamplerParams(biases=biases({3: 100.0}))], 10)
    logits, where = torch.arange(10.0).view(1, 10), torch.tensor([0])
    assert sampler.sample(logits, where, where).tolist() == [3]
    row = torch.from_numpy(pack_slot(SlotInit(1, 0, (), SamplerParams()), 10))
    sampler.write_slots(row, where, torch.tensor([1]))
    assert sampler.sample(logits, where, where).tolist() == [9]


def test_rows_without_an_init_change_nothing() -> None:
    sampler = make_owned([SamplerParams(top_k=3), SamplerParams(top_k=4)], 10)
    sampler.count_inputs(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 9]))
    before = [sampler.tables.settings.clone(), sampler.tables.occurrences.clone()]
    garbage = torch.full((2, ROW_WIDTH), 77, dtype=torch.int32)
    sampler.write_slots(garbage, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert torch.equal(before[0], sampler.tables.settings)
    assert torch.equal(before[1], sampler.tables.occurrences)


def test_a_new_owner_forgets_what_the_old_one_saw() -> None:
    sampler = make_owned([SamplerParams(), SamplerParams()], 10)
    sampler.count_inputs(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([0, 9]))
    row = torch.from_numpy(pack_slot(SlotInit(1, 0, (), SamplerParams()), 10))
    sampler.write_slots(row, torch.tensor([1]), torch.tensor([1]))
    assert not sampler.tables.occurrences[1].any()
    assert sampler.tables.occurrences[0, 1] == IN_PROMPT


def test_what_the_tables_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="17 stop tokens, the limit is 16"):
        pack_slot(SlotInit(1, 0, tuple(range(17)), SamplerParams()), 100)
    with pytest.raises(InvalidRequestError, match="seed is -1"):
        pack_slot(SlotInit(1, 0, (), SamplerParams(seed=-1)), 100)
    with pytest.raises(InvalidRequestError, match="logit_bias has 1025 tokens, the limit is 1024"):
        pack_biases(SamplerParams(biases=bytes(8 * 1025)))


# --- Masks -----------------------------------------------------------------------------------------------------


def test_filters_come_before_the_mask_and_what_it_allows_of_the_kept_is_drawn() -> None:
    """Where it allows none of the kept tokens, one of all that it allows; where it allows none at all, none."""
    vocab_size = 203
    logits = troubled_logits(2 * len(MIXED), vocab_size, seed=3)
    slots = torch.cat([torch.arange(len(MIXED))] * 2)
    positions = torch.arange(len(slots)) + 9
    num_kept_drawn = num_others_drawn = 0
    for seed in range(16):
        sampler = make_owned(list(MIXED), vocab_size)
        unmasked = sampler.sample(logits, slots, positions)
        allowed = random_masks(len(MIXED), vocab_size, seed).roll(seed, 0)
        masked = torch.rand(len(MIXED), generator=torch.Generator().manual_seed(seed)) < 0.8
        at = torch.where(masked, positions.view(2, -1)[seed % 2], -1)
        give_masks(sampler, allowed, at)
        scores = penalised_logits(sampler.tables, logits, slots, positions)
        tokens = sampler.sample(logits, slots, positions)
        for row, slot in enumerate(slots.tolist()):
            token, free = int(tokens[row]), int(unmasked[row])
            if at[slot] != positions[row]:
                assert token == free, "a row without a mask, or at another position"
                continue
            possible = allowed[slot] & (scores[row] > float("-inf"))
            if not possible.any():
                assert token == NO_TOKEN
                continue
            assert possible[token]
            if possible[free] and free >= 0:
                assert token == free, "a token that the mask allows is drawn with it as without it"
            if sampler.tables.temperature[slot] > 0:
                kept = kept_logits(sampler.tables, scores[row : row + 1], slots[row : row + 1])[0] > float("-inf")
                assert kept[token] or not (kept & possible).any()
                num_kept_drawn += bool(kept[token])
                num_others_drawn += not kept[token]
            else:
                best = scores[row].masked_fill(~possible, float("-inf")).max()
                assert scores[row, token] == best
    assert min(num_kept_drawn, num_others_drawn) > 10


def test_draws_under_a_mask_have_the_probabilities_of_the_allowed_tokens() -> None:
    vocab_size, num_draws = 40, 20_000
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2))
    sampler = make_owned([SamplerParams(temperature=1.3, seed=seed) for seed in range(num_draws)], vocab_size)
    allowed = torch.arange(vocab_size).unsqueeze(0) % 3 == 1
    positions = torch.full((num_draws,), 7)
    give_masks(sampler, allowed.expand(num_draws, -1), positions)
    tokens = sampler.sample(logits.expand(num_draws, -1), torch.arange(num_draws), positions)
    found = torch.bincount(tokens.long(), minlength=vocab_size) / num_draws
    expected = (logits[0] / 1.3).masked_fill(~allowed[0], float("-inf")).softmax(0)
    assert (found - expected).abs().max() < 0.012
    assert not found[~allowed[0]].any()


def test_an_input_that_is_forgotten_is_counted_once_when_it_comes_again() -> None:
    sampler = make_owned([SamplerParams(frequency_penalty=1.0)], 50, prompt_len=2)
    slot = torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        sampler.count_inputs(torch.tensor([7]), slot, torch.tensor([5]))
    sampler.forget_inputs(torch.zeros(1, dtype=torch.int32), torch.tensor([7], dtype=torch.int32))
    assert int(sampler.tables.occurrences[0, 7]) == 1
