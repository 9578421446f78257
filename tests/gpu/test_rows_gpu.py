"""The Triton prologue of a step against the torch one: every bucket, random plans, everything a later kernel reads."""

import numpy as np
import pytest
import torch
from torch import Tensor

from graphgen.capture.buckets import build_ladder
from graphgen.ipc.messages import Bucket
from graphgen.ipc.step_schema import StepBounds, StepShape
from graphgen.models.rope import Rope
from graphgen.models.sampling import NO_TOKEN
from graphgen.models.spec import RopeSpec
from graphgen.worker.inputs import input_layout
from graphgen.worker.outputs import OutputRing
from graphgen.worker.rows import ExpandedStep, SlotTables, TorchRows

NUM_SLOTS, PAGES, PAGE_SIZE, TRASH_PAGE = 256, 40, 64, 10_000
BOUNDS = StepBounds(max_chunks=32, trash_slot=NUM_SLOTS, pages_per_slot=PAGES, params_width=4)
BUCKETS = build_ladder(token_budget=512, num_slots=NUM_SLOTS)


def random_fields(bucket: Bucket, seed: int) -> dict[str, Tensor]:
    """Fields as they are packed, with any number of live chunks, decodes and new pages."""
    rng = np.random.default_rng(seed)
    layout = input_layout(BOUNDS.any_plan(bucket), BOUNDS)
    block = torch.zeros(layout.num_words + 3, dtype=torch.int32)
    fields = {name: view.numpy() for name, view in layout.views(block).items()}
    slots = rng.permutation(NUM_SLOTS)
    capacity = BOUNDS.any_plan(bucket).num_chunks
    chunks = int(rng.integers(0, capacity + 1))
    live = int(rng.integers(chunks, bucket.prefill_rows + 1)) if chunks else 0
    cuts = np.sort(rng.permutation(np.arange(1, max(live, 1)))[: max(chunks - 1, 0)])
    fields["chunk_starts"][:] = live
    if chunks:
        fields["chunk_starts"][: chunks + 1] = [0, *cuts, live]
    fields["chunk_slots"][:] = NUM_SLOTS
    fields["chunk_slots"][:chunks] = slots[:chunks]
    fields["chunk_positions"][:chunks] = rng.integers(0, 2000, chunks)
    fields["chunk_draws"][:chunks] = rng.integers(0, 2, chunks)
    fields["chunk_token_ids"][:live] = rng.integers(0, 32_000, live)
    decodes = int(rng.integers(0, min(bucket.decode_rows, NUM_SLOTS - chunks) + 1))
    fields["decode_slots"][:] = NUM_SLOTS
    fields["decode_slots"][:decodes] = slots[chunks : chunks + decodes]
    fields["decode_positions"][:decodes] = rng.integers(0, PAGES * PAGE_SIZE, decodes)
    places = rng.permutation(NUM_SLOTS * PAGES)[: int(rng.integers(0, BOUNDS.any_plan(bucket).num_new_pages + 1))]
    groups, pages = np.zeros(len(places), np.int64), rng.integers(0, TRASH_PAGE, len(places))
    entries = np.stack((groups, places // PAGES, places % PAGES, pages), axis=1)
    fields["new_pages"][: entries.size] = entries.reshape(-1)
    fields["counts"][:] = (live, len(places), rng.integers(0, 4))
    return {name: view.cuda() for name, view in layout.views(block).items()}


def live_part(step: ExpandedStep, fields: dict[str, Tensor], split: int) -> list[Tensor]:
    """What later kernels read: rows that hold nothing have no length, and what the trash slot draws is dropped."""
    rows = step.rows.slots != NUM_SLOTS
    drawing = step.drawing_rows.slots != NUM_SLOTS
    rows_part = [tensor[rows] for tensor in step.rows] + [step.rows.slots, step.rows.positions]
    return [*rows_part, *step.tables, *(tensor[drawing] for tensor in step.drawing_rows), step.drawing_rows.slots]


@pytest.mark.parametrize("seed", range(3))
def test_both_prologues_agree_on_every_bucket(seed: int) -> None:
    from graphgen.worker.rows_cuda import TritonRows

    device = torch.device("cuda")
    prompt_len = torch.randint(0, 3000, (NUM_SLOTS + 1, 28), dtype=torch.int32, device=device)[:, 7]
    for bucket in BUCKETS:
        fields = random_fields(bucket, seed)
        slots = SlotTables(NUM_SLOTS, PAGES, TRASH_PAGE, device)
        slots.last_token.random_(0, 32_000)
        steps, tables, rings, last_tokens = [], [], [], []
        for kind in (TorchRows, TritonRows):
            own = SlotTables(NUM_SLOTS, PAGES, TRASH_PAGE, device)
            own.last_token.copy_(slots.last_token)
            outputs = OutputRing(StepShape(Bucket(512, 512), 32, 0), device).views(BOUNDS.any_plan(bucket))
            rows = kind(bucket, fields, own, prompt_len, outputs, PAGE_SIZE, TRASH_PAGE)
            rows.append_pages()
            step = rows.expand()
            tokens = torch.arange(len(step.drawing_rows.rows), dtype=torch.int32, device=device) + 7
            tokens[::3] = NO_TOKEN  # reaches the ring; the slot gets token 0
            rows.feed_back(tokens, step.drawing_rows)
            steps.append(live_part(step, fields, bucket.prefill_rows))
            tables.append(own.block_table[:NUM_SLOTS])
            rings.append(outputs["token_ids"])
            last_tokens.append(own.last_token[:NUM_SLOTS])
        for got, want in zip(*steps, strict=True):
            assert torch.equal(got, want), bucket
        for pair in (tables, rings, last_tokens):
            assert torch.equal(*pair), bucket


def test_flattened_pages_equal_a_plain_loop() -> None:
    from graphgen.models.attention.ragged import flatten_pages

    for num_requests in (1, 7, 32, 256):
        kv_lens = torch.randint(0, PAGES * PAGE_SIZE + 1, (num_requests,), dtype=torch.int32)
        pages = torch.randint(0, TRASH_PAGE, (num_requests, PAGES), dtype=torch.int32)
        starts, flat, last_lens = (tensor.cpu() for tensor in flatten_pages(kv_lens.cuda(), pages.cuda(), PAGE_SIZE))
        expected: list[int] = []
        for request, kv_len in enumerate(kv_lens.tolist()):
            assert starts[request] == len(expected)
            count = -(-kv_len // PAGE_SIZE)
            expected += pages[request, :count].tolist()
            assert last_lens[request] == kv_len - max(count - 1, 0) * PAGE_SIZE
        assert starts[num_requests] == len(expected)
        assert flat[: len(expected)].tolist() == expected
        assert not flat[len(expected) : len(expected) + 256].any()


def test_angles_equal_torch_on_the_cpu() -> None:
    positions = torch.randint(0, 131_072, (513,), device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 96, 128):
            rope = RopeSpec(theta=500_000.0, attention_factor=1.2)
            on_cpu = Rope(rope, head_dim, torch.device("cpu"))(positions.cpu(), positions.cpu(), torch.float32)
            got = Rope(rope, head_dim, torch.device("cuda"))(positions, positions, dtype)
            for one, other in zip(got, on_cpu, strict=True):
                torch.testing.assert_close(
                    one.cpu(), other.to(dtype), rtol=0, atol=2e-7 if dtype is torch.float32 else 4e-3
                )
