"""Which page group each layer belongs to, and which tensors hold its pages.

Layers that see the same positions keep the same pages. Where some layers see a window only, the others would hold its
pages in vain if all shared one block table. So layers are put into page groups of one window each, and all groups have
as many layers: then a page takes the same memory in every group, all pages come from one pool, and layers at the same
place of their groups share a tensor, of which each group owns other pages.

                      layers of the model                  tensors
    group 0, all      0  6  12  ...                        k_pages[0], k_pages[1], ...
    group 1, window   1  7  13  ...                        k_pages[0], k_pages[1], ...
    group 2, window   2  8  14  ...                        ...

Owns arithmetic only. Called by the worker, for the KV cache and for what the scheduler has to know.
"""

from collections.abc import Sequence
from typing import NamedTuple

from graphgen.models.spec import Layer

MOST_GROUPS = 8
"""Each has a block table, and its own part in the prologue of a step."""


class PageLayout(NamedTuple):
    """The page groups of one model."""

    windows: tuple[int | None, ...]
    """Of each group: positions that a row sees, its own included; None is all."""
    groups: tuple[int, ...]
    """Of each layer: its group."""
    places: tuple[int, ...]
    """Of each layer: which of the tensors its pages lie in."""

    @property
    def num_tensors(self) -> int:
        """As many as a group has layers."""
        return max(self.places) + 1


def one_group(num_layers: int) -> PageLayout:
    """All layers keep all positions."""
    return PageLayout((None,), (0,) * num_layers, tuple(range(num_layers)))


def page_layout(layers: Sequence[Layer], max_model_len: int) -> PageLayout:
    """The groups of a model whose requests have at most `max_model_len` positions: a window that reaches so far is
    none. Layers whose keys differ in shape keep all positions together."""
    windows = [_within(layer.mixer.reach, max_model_len) for layer in layers]
    shapes = {layer.mixer.kept for layer in layers}
    if len(shapes) > 1:
        return one_group(len(layers))
    kinds = sorted(set(windows), key=lambda window: (window is not None, -(window or 0)))
    size = _group_size([windows.count(kind) for kind in kinds])
    of_group: list[int | None] = []
    groups, places = [0] * len(layers), [0] * len(layers)
    for kind in kinds:
        members = [number for number, window in enumerate(windows) if window == kind]
        for first in range(0, len(members), size):
            for place, number in enumerate(members[first : first + size]):
                groups[number], places[number] = len(of_group), place
            of_group.append(kind)
    return PageLayout(tuple(of_group), tuple(groups), tuple(places))


def _within(window: int | None, max_model_len: int) -> int | None:
    return window if window is not None and window < max_model_len else None


def _group_size(counts: Sequence[int]) -> int:
    """Layers of a group, of which there are so many of each kind, those that keep most first.

    What a group has too few of is memory that nobody uses. It costs most in the first kind, whose pages stay.
    """
    sizes = [size for size in range(1, max(counts) + 1) if _num_groups(counts, size) <= MOST_GROUPS]

    def cost(size: int) -> tuple[int, int, int]:
        num_groups = _num_groups(counts, size)
        return -counts[0] % size, num_groups * size - sum(counts) + num_groups, num_groups

    return min(sizes, key=cost)


def _num_groups(counts: Sequence[int], size: int) -> int:
    return sum(-(-count // size) for count in counts)
