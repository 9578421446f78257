"""The blocked KV cache: one K and one V tensor per layer of a page group, or one that is both, cut into pages.

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
from graphgen.models.page_layout import PageLayout, one_group
from graphgen.models.spec import ModelSpec


def bytes_per_page(spec: ModelSpec, layout: PageLayout, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page over all layers of a page group, K and V together."""
    name = str(dtype).removeprefix("torch.")
    of_tensor = dict(zip(layout.places, (layer.mixer.keeps(name).bytes for layer in spec.layers), strict=True))
    return page_size * sum(of_tensor.values())


class KVCache:
    """`num_pages` pages to give out and, behind them, the trash page where padded rows write.

    `k_pages[layer]`, `v_pages[layer]`: [num_pages + 1, page_size, Hkv, D] of that layer, shared with the layers at the
    same place of other page groups; both are one tensor where values are parts of keys (latent attention). Zero-filled:
    memory left over by others can hold NaN, and a kernel that reads a whole page multiplies what lies past a sequence
    by a weight of zero."""

    def __init__(
        self,
        spec: ModelSpec,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: PageLayout | None = None,
    ) -> None:
        """layout: None keeps all positions of all layers."""
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"num_pages is {num_pages} and page_size {page_size}: both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        layout = layout or one_group(spec.num_layers)
        self.groups = layout.groups
        """Of each layer: its page group, which says which block tables are its own."""
        mixers = dict(zip(layout.places, (layer.mixer for layer in spec.layers), strict=True))
        kept = [
            [_zeros((num_pages + 1, page_size, *shape), dtype, device) for shape in mixers[place].kept]
            for place in range(layout.num_tensors)
        ]
        self.k_pages = [kept[place][0] for place in layout.places]
        self.v_pages = [kept[place][-1] for place in layout.places]
        self._tensors = [*(tensors[0] for tensors in kept), *(tensors[1] for tensors in kept if len(tensors) > 1)]
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
