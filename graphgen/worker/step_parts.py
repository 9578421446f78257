"""What all steps of an engine are made of: the tables and rings on the device, and the shape of every step.

Owns them, and makes the step of any shape over a KV cache. Never runs a step, never captures one, and holds no stream
and nothing of one plan. Built by runner.py on a device, and by dry_run.py on none.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from graphgen.capture.buckets import build_ladder, essential_of
from graphgen.ipc.step_schema import MAX_SCORED_ROWS, StepBounds, StepShape
from graphgen.ipc.worker_messages import Bucket, PageGroup
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.attention.backend import AttentionBackend
from graphgen.models.collectives.group import RankGroup
from graphgen.models.decoder import Decoder
from graphgen.models.kv_cache import KVCache, bytes_per_page
from graphgen.models.page_layout import page_layout
from graphgen.models.sampling import ROW_WIDTH, make_sampler
from graphgen.worker.inputs import input_layout
from graphgen.worker.outputs import LAYOUTS_KEPT, OutputRing
from graphgen.worker.rows import SlotTables
from graphgen.worker.scoring import PromptScores
from graphgen.worker.step import Step

MAX_CHUNKS = 32
"""Chunks one step may hold. More would only help prompts shorter than a thirty-second of the budget."""


class StepShapes:
    """The buckets of an engine, and what any of its steps may hold. Needs no device."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self.spec = config.rank_spec
        self.buckets = build_ladder(config.token_budget, config.num_slots)
        self.first_buckets = self.buckets if config.captures_all else essential_of(self.buckets)
        """Those that are captured before the worker is ready."""
        self.page_layout = page_layout(self.spec.layers, config.max_model_len)
        self.page_groups = tuple(PageGroup(window) for window in self.page_layout.windows)
        longest_chunk = max(bucket.prefill_rows for bucket in self.buckets)
        self.bounds = StepBounds(
            max_chunks=min(MAX_CHUNKS, longest_chunk),
            trash_slot=config.num_slots,
            num_groups=len(self.page_groups),
            most_pages=sum(
                group.most_pages(config.max_model_len, config.page_size, longest_chunk) for group in self.page_groups
            ),
            params_width=ROW_WIDTH,
        )
        self.layout_of = lru_cache(LAYOUTS_KEPT)(lambda step: input_layout(step, self.bounds))
        """The input block of a step of some shape."""

    @property
    def widest(self) -> StepShape:
        """As many rows of each kind as any step has."""
        return self.bounds.any_plan(_widest(self.buckets))

    def largest_first(self, buckets: Sequence[Bucket]) -> list[StepShape]:
        """Of each of these buckets, which come fewest rows first, a step of any plan."""
        return [self.bounds.any_plan(bucket) for bucket in reversed(buckets)]

    @property
    def pages_per_slot(self) -> int:
        """Entries of a block table."""
        return -(-self._config.max_model_len // self._config.page_size)

    @property
    def page_bytes(self) -> int:
        """Of one page in all layers that share it."""
        return bytes_per_page(self.spec, self.page_layout, self._config.page_size, self._config.kv_format)


class StepParts:
    """The decoder and its surroundings on one device."""

    def __init__(
        self,
        config: LaunchConfig,
        shapes: StepShapes,
        decoder: Decoder,
        backend: AttentionBackend,
        device: torch.device,
        ranks: RankGroup | None,
    ) -> None:
        """ranks: that share the decoder."""
        self._config = config
        self._shapes = shapes
        self._backend = backend
        self._device = device
        self._ranks = ranks
        self.decoder = decoder
        self.sampler = make_sampler(config.num_slots, config.spec.num_drawable, device)
        widest = shapes.widest
        self.num_words = shapes.layout_of(widest).num_words
        """Of the widest step's input."""
        self.block = torch.zeros(self.num_words, dtype=torch.int32, device=device)
        self.outputs = OutputRing(widest, device)
        self.scores = PromptScores(decoder, self.sampler, self.block, shapes.layout_of(widest))

    def open_kv_cache(self, num_pages: int) -> KVCache:
        """A KV cache of so many pages, zeros."""
        config = self._config
        return KVCache(
            self._shapes.spec,
            num_pages,
            config.page_size,
            getattr(torch, config.dtype),
            self._device,
            self._shapes.page_layout,
            kept_as=config.kv_format,
            head_scales=self.decoder.head_scales,
        )

    def open_slots(self, kv_cache: KVCache) -> SlotTables:
        """What the steps over this cache keep between them."""
        return SlotTables(
            self._config.num_slots,
            self._shapes.pages_per_slot,
            kv_cache.trash_page,
            self._device,
            self._shapes.page_layout.windows,
        )

    def step_maker(self, kv_cache: KVCache, slots: SlotTables) -> Callable[[StepShape], Step]:
        """What makes the step of any shape over this cache. slots: that all of them share, see `open_slots`."""
        return lambda shape: Step(
            bucket=shape.bucket,
            layout=self._shapes.layout_of(shape),
            block=self.block,
            slots=slots,
            outputs=self.outputs.views(shape),
            decoder=self.decoder,
            kv_cache=kv_cache,
            attention=self._backend,
            sampler=self.sampler,
            scores=self.scores,
            ranks=self._ranks,
        )

    def scoring_step(self) -> Callable[[], None]:
        """What scores all rows that a step may have left."""
        return self.scores.step_of(MAX_SCORED_ROWS)


def _widest(buckets: Sequence[Bucket]) -> Bucket:
    """As many rows of each kind as any of them has."""
    return Bucket(max(bucket.prefill_rows for bucket in buckets), max(bucket.decode_rows for bucket in buckets))
