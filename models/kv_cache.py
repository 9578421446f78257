"""The blocked KV cache: one K and one V tensor per layer, cut into pages.

Owns the memory and the place of the trash page. Never decides who gets a page: the scheduler owns pages, the
attention backends write them. Called by the worker when it sizes memory, and by the decoder for each layer's
pages.
"""

import math

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.spec import ModelSpec


def bytes_per_page(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers, K and V together."""
    return 2 * spec.num_layers * page_size * spec.kv_size * dtype.itemsize


class KVCache:
    """`num_pages` pages to give out and, behind them, the trash page where padded rows write.

    `k_pages[layer]`, `v_pages[layer]`: [num_pages + 1, page_size, Hkv, D]. Zero-filled: memory left over by
    others can hold NaN, and a kernel that reads a whole page multiplies what lies past a sequence by a weight
    of zero.
    """

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"num_pages is {num_pages} and page_size {page_size}: both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages + 1, page_size, spec.num_kv_heads, spec.head_dim)
        self.k_pages = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]
        self.v_pages = [_zeros(shape, dtype, device) for _ in range(spec.num_layers)]

    @property
    def trash_page(self) -> int:
        """The page that belongs to no request."""
        return self.num_pages

    @property
    def num_bytes(self) -> int:
        """Memory of all pages, the trash page included."""
        return sum(pages.nbytes for pages in (*self.k_pages, *self.v_pages))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU the operating system hands them out page by page when they are first used: a gigabyte costs a
    start nothing, and a run only what it uses."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
