"""Random plans for the prologue of a step, and whether two versions of it agree. Used on a GPU and in Triton's
interpreter."""

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.step_schema import StepBounds, StepShape
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.sampling import NO_TOKEN
from graphgen.worker.inputs import input_layout
from graphgen.worker.outputs import OutputRing
from graphgen.worker.rows import ExpandedStep, SlotTables, TorchRows

NUM_SLOTS, PAGES, PAGE_SIZE, TRASH_PAGE = 256, 40, 64, 10_000

Windows = tuple[int | None, ...]


def bounds_of(windows: Windows) -> StepBounds:
    num_groups = len(windows)
    return StepBounds(32, trash_slot=NUM_SLOTS, num_groups=num_groups, most_pages=num_groups * PAGES, params_width=4)


def random_fields(bucket: Bucket, bounds: StepBounds, seed: int) -> dict[str, Tensor]:
    """Fields as they are packed, with any number of live chunks, decodes and new pages."""
    rng = np.random.default_rng(seed)
    step = bounds.any_plan(bucket)
    layout = input_layout(step, bounds)
    block = torch.zeros(layout.num_words + 3, dtype=torch.int32)
    fields = {name: view.numpy() for name, view in layout.views(block).items()}
    slots = rng.permutation(NUM_SLOTS)
    chunks = int(rng.integers(0, step.num_chunks + 1))
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
    places = rng.permutation(bounds.num_groups * NUM_SLOTS * PAGES)[: int(rng.integers(0, step.num_new_pages + 1))]
    groups, of_group = places // (NUM_SLOTS * PAGES), places % (NUM_SLOTS * PAGES)
    entries = (groups, of_group // PAGES, of_group % PAGES, rng.integers(0, TRASH_PAGE, len(places)))
    fields["new_pages"][: 4 * len(places)] = np.stack(entries, axis=1).reshape(-1)
    fields["counts"][:] = (live, len(places), rng.integers(0, 4))
    return layout.views(block)


def live_part(step: ExpandedStep) -> list[Tensor]:
    """What later kernels read: rows that hold nothing have no length, and what the trash slot draws is dropped."""
    rows = step.rows.slots != NUM_SLOTS
    drawing = step.drawing_rows.slots != NUM_SLOTS
    rows_part = [tensor[rows] for tensor in step.rows] + [step.rows.slots, step.rows.positions]
    tables = [tensor for of_group in step.tables for tensor in of_group]
    return [*rows_part, *tables, *(tensor[drawing] for tensor in step.drawing_rows), step.drawing_rows.slots]


def assert_prologues_agree(bucket: Bucket, windows: Windows, seed: int, device: torch.device) -> None:
    """TritonRows against TorchRows: everything a later kernel reads, the block tables, the ring and the last tokens."""
    from graphgen.worker.rows_cuda import TritonRows  # Triton exists where it is installed

    generator = torch.Generator().manual_seed(seed)
    bounds = bounds_of(windows)
    prompt_len = torch.randint(0, 3000, (NUM_SLOTS + 1, 28), dtype=torch.int32, generator=generator).to(device)[:, 7]
    last_token = torch.randint(0, 32_000, (NUM_SLOTS + 1,), generator=generator)
    pages = torch.randint(0, TRASH_PAGE, (len(windows), NUM_SLOTS + 1, PAGES), dtype=torch.int32, generator=generator)
    pages[:, NUM_SLOTS] = TRASH_PAGE
    fields = {name: view.to(device) for name, view in random_fields(bucket, bounds, seed).items()}
    found = []
    for kind in (TorchRows, TritonRows):
        slots = SlotTables(NUM_SLOTS, PAGES, TRASH_PAGE, device, windows)
        slots.last_token.copy_(last_token)
        slots.block_tables.copy_(pages)
        outputs = OutputRing(StepShape(Bucket(512, 512), 32, 0), device).views(bounds.any_plan(bucket))
        rows = kind(bucket, fields, slots, prompt_len, outputs, PAGE_SIZE, TRASH_PAGE)
        rows.append_pages()
        step = rows.expand()
        tokens = torch.arange(len(step.drawing_rows.rows), dtype=torch.int32, device=device) + 7
        tokens[::3] = NO_TOKEN  # reaches the ring; the slot gets token 0
        rows.feed_back(tokens, step.drawing_rows)
        tables = slots.block_tables[:, :NUM_SLOTS], outputs["token_ids"], slots.last_token[:NUM_SLOTS]
        found.append([*live_part(step), *tables])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want), bucket
