"""Which pages a request holds in each page group, and how many that are.

A page group is a number of layers that keep the same positions of a request: all of them, or those that the window of a
later row reaches. Each group has block tables of its own. Pages are of one size in all groups and come from one pool,
so that what windows spare is there for whoever needs it, whatever the lengths of the requests.

In a group without a window a request holds the pages of all that it knows from its start on. In one with a window it
holds those that rows to come read, and while its prompt is computed also those of the next chunk, whatever its length.

Owns arithmetic and the tables' shape; takes no page and gives none back. Used by `graphgen.scheduler.policy` and its
parts.
"""

from collections.abc import Sequence

from graphgen.ipc.worker_messages import PageGroup


class BlockTable:
    """A request's pages in one group: entries `first` to `end` - 1. Position p lies in entry p // page_size."""

    __slots__ = ("end", "first", "num_entered", "num_sent", "pages")

    def __init__(self, first: int, shared: list[int], new: list[int]) -> None:
        """shared: from entry `first` on, and behind them the new ones."""
        self.first = first
        self.pages = shared + new
        self.end = first + len(self.pages)
        self.num_entered = first + len(shared)
        """Entries up to here the prefix cache knows, or knew."""
        self.num_sent = first
        """Entries up to here the worker knows."""

    def append(self, page: int) -> None:
        self.pages.append(page)
        self.end += 1

    def part(self, start: int, end: int) -> list[int]:
        """The pages of entries `start` to `end` - 1, all of which it has."""
        return self.pages[start - self.first : end - self.first]

    def drop_before(self, first: int) -> list[int]:
        """Ends what lies before entry `first`, which may be nothing; returns those pages."""
        count = max(0, first - self.first)
        dropped = self.pages[:count]
        del self.pages[:count]
        self.first += count
        return dropped


class PageGroups:
    """The groups of one model, on pages of one size."""

    def __init__(self, windows: Sequence[int | None], page_size: int, longest_chunk: int) -> None:
        """windows: positions that a row sees in each group, its own included; None sees all."""
        self._page_size = page_size
        self._longest_chunk = longest_chunk
        self.windows = tuple(windows)
        self.has_windows = any(window is not None for window in windows)
        self._groups = [PageGroup(window) for window in windows]

    def __len__(self) -> int:
        return len(self.windows)

    def pages_for(self, num_positions: int) -> int:
        """Pages that hold so many positions of one request in one group without a window."""
        return -(-num_positions // self._page_size)

    def most_pages(self, num_positions: int) -> int:
        """Pages that a request of so many positions holds at once, of all groups."""
        if not self.has_windows:
            return self.pages_for(num_positions) * len(self.windows)
        return sum(one.most_pages(num_positions, self._page_size, self._longest_chunk) for one in self._groups)

    def first_page(self, group: int, position: int) -> int:
        """The first page that a row at this position, or any later one, reads."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self._page_size

    def start_ends(self, num_shared: int, num_tokens: int, end_position: int | None) -> tuple[int, ...]:
        """Where the tables of a request end that starts behind `num_shared` pages.

        end_position: of a request that gets every page it can ever need at once; where there is a window it asks for
        more as others do.
        """
        full = self.pages_for(num_tokens if end_position is None else end_position)
        if not self.has_windows:
            return (full,) * len(self.windows)
        # One page more than a chunk has, since it may also copy the beginning of one.
        windowed = min(self.pages_for(num_tokens), num_shared + self.pages_for(self._longest_chunk) + 1)
        return tuple(full if window is None else windowed for window in self.windows)

    def chunk_end(self, num_prefilled: int, num_tokens: int) -> int:
        """Where each table ends at least when the next chunk is planned, whatever the chunk's length."""
        return self.pages_for(min(num_tokens, num_prefilled + self._longest_chunk))
