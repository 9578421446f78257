"""The blocked KV cache: one K and one V tensor per layer of a page group, or one that is both, cut into pages.

Owns the memory and the place of the trash page. Never decides who gets a page: the scheduler owns pages, the
attention backends write them. Called by the worker when it sizes memory and copies pages, and by the decoder for each
layer's pages.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.pages import STORED_DTYPES, LayerPages
from graphgen.models.page_layout import PageLayout, one_group
from graphgen.models.spec import ModelSpec, kv_format

HeadScales = tuple[Tensor, Tensor]
"""Of the keys and of the values of one layer, [Hkv] float32 each."""


def bytes_per_page(spec: ModelSpec, layout: PageLayout, page_size: int, kept_as: str) -> int:
    """Memory of one page over all layers of a page group, K and V together. kept_as: a KV format's name."""
    of_tensor = dict(zip(layout.places, (layer.mixer.keeps(kept_as).bytes for layer in spec.layers), strict=True))
    return page_size * sum(of_tensor.values())


class KVCache:
    """`num_pages` pages to give out and, behind them, the trash page where padded rows write.

    `pages[layer]`: what the layer's attention reads and writes, shared with the layers at the same place of other page
    groups. Zero-filled: memory left over by others can hold NaN, and a kernel that reads a whole page multiplies what
    lies past a sequence by a weight of zero."""

    def __init__(
        self,
        spec: ModelSpec,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: PageLayout | None = None,
        kept_as: str | None = None,
        head_scales: Sequence[HeadScales] | None = None,
    ) -> None:
        """dtype: the model's. layout: None keeps all positions of all layers. kept_as: a KV format's name; None: the
        dtype's. head_scales: of each layer, read where the format is fp8; None: 1."""
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"num_pages is {num_pages} and page_size {page_size}: both must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        has_scales = kept_as is not None and kv_format(kept_as).scale_bytes > 0
        layout = layout or one_group(spec.num_layers)
        self.groups = layout.groups
        """Of each layer: its page group, which says which block tables are its own."""
        mixers = dict(zip(layout.places, (layer.mixer for layer in spec.layers), strict=True))
        shapes = [mixers[place].kept for place in range(layout.num_tensors)]

        def allocate(shape: tuple[int, ...], stored_as: torch.dtype) -> Tensor:
            return _zeros((num_pages + 1, page_size, *shape), stored_as, device)

        stored_as = STORED_DTYPES.get(kept_as or "", dtype)
        elements = [[allocate(shape, stored_as) for shape in kept] for kept in shapes]
        scales = [[allocate(shape[:1], torch.float32) for shape in kept if has_scales] for kept in shapes]
        of_layers: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * spec.num_layers
        if kept_as == "fp8":
            of_layers = [*(head_scales or (_ones(layer.mixer.kept[0][0], device) for layer in spec.layers))]
        elif has_scales:
            of_layers = [(scales[place][0], scales[place][-1]) for place in layout.places]
        self.pages = [
            LayerPages(elements[place][0], elements[place][-1], *of_layer)
            for place, of_layer in zip(layout.places, of_layers, strict=True)
        ]
        self.k_pages = [pages.k for pages in self.pages]
        self.v_pages = [pages.v for pages in self.pages]
        self._tensors = [tensor for of_place in (*elements, *scales) for tensor in of_place]
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

    def fill_with_noise(self, num_pages: int) -> None:
        """Random numbers in the first pages, the same in each page of each layer."""
        noise: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        for pages in self._tensors:
            kind = pages.shape[1:], pages.dtype
            if kind not in noise:
                noise[kind] = _noise(pages[0])
            _movable(pages)[:num_pages].copy_(_movable(noise[kind]))

    def clear(self, num_pages: int) -> None:
        """Zeros in the first pages and in the trash page."""
        for pages in self._tensors:
            _movable(pages)[:num_pages].zero_()
            _movable(pages)[self.trash_page].zero_()


def _noise(page: Tensor) -> Tensor:
    """Of a page's shape and dtype; as it is read, integers with their scales included, of about unit variance."""
    if page.dtype == torch.float32 and page.ndim == 2:  # scales of positions
        return torch.full_like(page, 1 / 32)
    numbers = torch.empty(page.shape, dtype=torch.float32, device=page.device)
    numbers.normal_(generator=torch.Generator(page.device).manual_seed(0))
    return (numbers * 32).to(page.dtype) if page.dtype == torch.int8 else numbers.to(page.dtype)


def _movable(pages: Tensor) -> Tensor:
    """The same memory in a dtype that operators which move elements know; few know those of one byte."""
    return pages.view(torch.uint8) if pages.itemsize == 1 else pages


def _copy_in_torch(tensors: list[Tensor]) -> Callable[[Tensor], None]:
    moved = [_movable(pages) for pages in tensors]

    def copy(copies: Tensor) -> None:
        sources, destinations = copies.long().unbind(1)
        for pages in moved:
            pages[destinations] = pages[sources]

    return copy


def _copy_on_cuda(tensors: list[Tensor]) -> Callable[[Tensor], None]:
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.models.page_copy import addresses_of, copy_pages

    sizes = dict.fromkeys(pages[0].nbytes for pages in tensors)
    of_size = {size: addresses_of([pages for pages in tensors if pages[0].nbytes == size]) for size in sizes}

    def copy(copies: Tensor) -> None:
        for page_bytes, addresses in of_size.items():
            copy_pages(addresses, copies, page_bytes)

    return copy


def _ones(num_heads: int, device: torch.device) -> HeadScales:
    ones = torch.ones(num_heads, dtype=torch.float32, device=device)
    return ones, ones


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU the operating system hands them out page by page when they are first used: a gigabyte costs a
    start nothing, and a run only what it uses."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
