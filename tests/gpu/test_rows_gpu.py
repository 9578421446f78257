"""The Triton prologue of a step against the torch one: every bucket, random plans, everything a later kernel reads."""

import pytest
import torch

from graphgen.capture.buckets import build_ladder
from graphgen.models.rope import Rope
from graphgen.models.spec import RopeSpec
from tests.worker.row_cases import NUM_SLOTS, PAGE_SIZE, PAGES, TRASH_PAGE, assert_prologues_agree

BUCKETS = build_ladder(token_budget=512, num_slots=NUM_SLOTS)


@pytest.mark.parametrize("windows", [(None,), (None, 100, 1000), (128,)])
def test_both_prologues_agree_on_every_bucket(windows: tuple[int | None, ...]) -> None:
    for seed, bucket in enumerate(BUCKETS):
        assert_prologues_agree(bucket, windows, seed, torch.device("cuda"))


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
