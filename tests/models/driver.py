"""Runs a decoder over a page pool, one step at a time: the worker's job in plain Python, with no slots and no
graphs.

Every step has padding in both regions, block tables are shuffled, and pages hold NaN until they are written,
so a kernel that reads a padded position or another request's page shows in the logits.
"""

import itertools
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphgen.models.attention.backend import StepAttention
from graphgen.models.attention.pages import LayerPages
from graphgen.models.attention.reference import TorchStep
from graphgen.models.attention.tables import RowTables
from graphgen.models.decoder import Decoder
from graphgen.models.kv_cache import KVCache
from graphgen.models.spec import ModelSpec


class Request:
    """Token ids, how many of them are computed, and the pages that hold their K and V."""

    def __init__(self, token_ids: Sequence[int], pages: list[int], prompt_len: int | None = None) -> None:
        self.token_ids = list(token_ids)
        self.prompt_len = len(self.token_ids) if prompt_len is None else prompt_len
        self.num_computed = 0
        self.pages = pages


def poison(pages: LayerPages, num_pages: int) -> None:
    """NaN in the first pages; of integers, in their scales."""
    of_positions = [scales for scales in pages[2:4] if scales is not None and scales.ndim > 1]
    for tensor in of_positions or pages[:2]:
        tensor[:num_pages].fill_(torch.nan)


Rows = list[tuple[Request, int] | None]
"""The rows of a region: a request and a position, or None for padding."""


class Driver:
    """A decoder, its pages, and the steps over them."""

    def __init__(
        self,
        decoder: Decoder,
        page_size: int = 4,
        num_pages: int = 96,
        seed: int = 0,
        padded_rows: int = 3,
        attention: Callable[[RowTables], StepAttention] = TorchStep,
        kept_as: str | None = None,
        spec: ModelSpec | None = None,
    ) -> None:
        """padded_rows: rows that hold no token, at the end of each region of each step. attention: of a step's rows.
        kept_as: a KV format's name; None: as computed. spec: of what the decoder's rank keeps; None: it is alone."""
        weight = decoder.embedding.weight
        self.decoder = decoder
        scales = decoder.head_scales
        self.kv_cache = KVCache(
            spec or decoder.spec, num_pages, page_size, weight.dtype, weight.device, kept_as=kept_as, head_scales=scales
        )
        for pages in self.kv_cache.pages:
            poison(pages, self.kv_cache.trash_page)
        self._attention = attention
        self._padding: list[None] = [None] * padded_rows
        self.last_logits = torch.empty(0)  # of every row of the last step, padded ones too
        self._device = weight.device
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)

    def request(self, token_ids: Sequence[int], prompt_len: int | None = None) -> Request:
        """A request with pages for its tokens and one page to grow into."""
        needed = len(token_ids) // self.kv_cache.page_size + 2
        return Request(token_ids, [self._free.pop() for _ in range(needed)], prompt_len)

    def step(
        self,
        chunks: Sequence[tuple[Request, int]] = (),
        decodes: Sequence[Request] = (),
        drawing_rows: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Computes the next `length` tokens of each chunk's request and the next one of each decode's.

        Returns float32 logits [length, V] of each chunk, then [1, V] of each decode; of the drawing rows
        alone, [1, V] each, where they are named.
        """
        num_chunk_rows = sum(length for _, length in chunks)
        prefill: Rows = [(r, r.num_computed + offset) for r, length in chunks for offset in range(length)]
        prefill += self._padding if chunks else []
        decode: Rows = [*((r, r.num_computed) for r in decodes), *self._padding]
        rows = prefill + decode
        logits = self.decoder(
            self._int64([row[0].token_ids[row[1]] if row else 0 for row in rows]),
            self._int64([row[1] if row else 0 for row in rows]),
            self._int64([max(row[0].prompt_len, row[1] + 1) if row else 1 for row in rows]),
            self.kv_cache,
            [self._attention(self._tables(chunks, prefill, decode))],
            None if drawing_rows is None else self._int64(drawing_rows),
        )
        self.last_logits = logits
        for request, length in [*chunks, *((request, 1) for request in decodes)]:
            request.num_computed += length
        logits = logits.float()
        if drawing_rows is not None:
            return list(logits.split(1))
        of_chunks = logits[:num_chunk_rows].split([length for _, length in chunks]) if chunks else []
        of_decodes = [logits[len(prefill) + row][None] for row in range(len(decodes))]
        return [*of_chunks, *of_decodes]

    def _tables(self, chunks: Sequence[tuple[Request, int]], prefill: Rows, decode: Rows) -> RowTables:
        unused_chunks = 2 if chunks else 0
        starts = list(itertools.accumulate((length for _, length in chunks), initial=0))
        return RowTables(
            kv_locations=self._int64([self._location(row) for row in prefill + decode]),
            chunk_starts=self._int32(starts + [starts[-1]] * unused_chunks),
            chunk_kv_lens=self._int32([r.num_computed + length for r, length in chunks] + [0] * unused_chunks),
            chunk_pages=self._block_tables([request for request, _ in chunks] + [None] * unused_chunks),
            decode_kv_lens=self._int32([row[1] + 1 if row else 1 for row in decode]),
            decode_pages=self._block_tables([row[0] if row else None for row in decode]),
        )

    def _location(self, row: tuple[Request, int] | None) -> int:
        if row is None:
            return self.kv_cache.trash_page * self.kv_cache.page_size
        page, offset = divmod(row[1], self.kv_cache.page_size)
        return row[0].pages[page] * self.kv_cache.page_size + offset

    def _block_tables(self, requests: Sequence[Request | None]) -> Tensor:
        """One row per request as wide as the widest, filled up with pages of nobody; None has the trash
        page."""
        tables = [request.pages if request else [self.kv_cache.trash_page] for request in requests]
        width = max(map(len, tables), default=1) + 1
        fill = self._free[-1]  # poisoned: nobody owns it
        return self._int32([table + [fill] * (width - len(table)) for table in tables]).view(len(tables), width)

    def _int64(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _int32(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
