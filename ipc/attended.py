"""What the rows of a step attend to, as far as its time depends on it.

Owns how that is counted, and no milliseconds: those are `graphgen.scheduler.cost_model`'s, by the slopes that
`graphgen.worker.step_timing` measures.
"""

from collections.abc import Iterable
from typing import NamedTuple

from graphgen.ipc.worker_messages import Chunk


class Attended(NamedTuple):
    """Three counts, each of which a step's time is linear in.

    A decode row reads the keys and values of every position it attends to. A prompt row computes with each; and a chunk
    reads those of all its positions for all of its rows, however few they are: the end of a long prompt takes longer
    than its pairs say.
    """

    decode_positions: int = 0
    """That the decode rows attend to, together."""
    prompt_pairs: int = 0
    """Of a prompt row and a position that it attends to."""
    chunk_positions: int = 0
    """That the chunks reach to, together."""

    def with_chunk(self, start: int, length: int) -> "Attended":
        """And the rows [start, start + length) of a prompt; row i attends to start + i + 1 positions."""
        if not length:
            return self
        pairs = length * start + length * (length + 1) // 2
        return Attended(self.decode_positions, self.prompt_pairs + pairs, self.chunk_positions + start + length)

    def with_chunks(self, chunks: Iterable[Chunk]) -> "Attended":
        attended = self
        for chunk in chunks:
            attended = attended.with_chunk(chunk.start, chunk.length)
        return attended
