"""The blocked KV cache: one K and one V tensor per layer, cut into pages.

Owns the memory and the place of the trash page. Never decides who gets a page: the scheduler owns pages, the
attention backends write them. Called by the worker when it sizes memory and copies pages, and by the decoder for each
layer's pages.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.spec import ModelSpec


def bytes_per_page(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers, K and V together."""
    return page_size * spec.kv_bytes_per_token(str(dtype).removeprefix("torch."))


class KVCache:
    """`num_pages` pages to give out and, behind them, the trash page where padded rows write.

    `k_pages[layer]`, `v_pages[layer]`: [num_pages + 1, page_size, Hkv, D] of that layer. Zero-filled: memory left over
    by others can hold NaN, and a kernel that reads a whole page multiplies what lies past a sequence by a weight of
    zero."""

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"num_pages is {num_pages} and page_size {page_size}: both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        mixers = [layer.mixer for layer in spec.layers]
        shapes = [(num_pages + 1, page_size, mixer.num_kv_heads, mixer.width) for mixer in mixers]
        self.k_pages = [_zeros(shape, dtype, device) for shape in shapes]
        self.v_pages = [_zeros(shape, dtype, device) for shape in shapes]
        self._copy = (_copy_on_cuda if device.type == "cuda" else _copy_in_torch)(self._tensors)

    @property
    def trash_page(self) -> int:
        """The page that belongs to no request."""
        return self.num_pages

    @property
    def num_bytes(self) -> int:
        """Memory of all pages, the trash page included."""
        return sum(pages.nbytes for pages in self._tensors)

    def copy_pages(self, copies: Tensor) -> None:
        """copies: [N, 2] int32 on the cache's device, (source, destination) of whole pages in every layer, all at once:
        no destination may be the source of another pair."""
        self._copy(copies)

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self.k_pages, *self.v_pages]


def _copy_in_torch(tensors: list[Tensor]) -> Callable[[Tensor], None]:
    def copy(copies: Tensor) -> None:
        sources, destinations = copies.long().unbind(1)
        for pages in tensors:
            pages[destinations] = pages[sources]

    return copy


def _copy_on_cuda(tensors: list[Tensor]) -> Callable[[Tensor], None]:
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.page_copy import addresses_of, copy_pages

    addresses, page_bytes = addresses_of(tensors), tensors[0][0].nbytes
    return lambda copies: copy_pages(addresses, copies, page_bytes)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU the operating system hands them out page by page when they are first used: a gigabyte costs a
    start nothing, and a run only what it uses."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
