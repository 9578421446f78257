"""What the rows of one step attend to: the tensors every attention backend, and every layer, reads.

Shapes: `T` token rows of the bucket = `P` prefill rows, then `R` decode rows; `C` chunks; `M` pages a block table
holds. Row t < P belongs to the chunk c with chunk_starts[c] <= t < chunk_starts[c + 1]; rows of the prefill region
past the last chunk are padding. Decode row r is row P + r.
"""

from typing import NamedTuple

from torch import Tensor


class RowTables(NamedTuple):
    """Static tensors of one bucket; their contents change every step, their addresses never."""

    kv_locations: Tensor
    """[T] int64: page * page_size + offset where the row's K and V go. Padded rows point into the trash page."""
    chunk_starts: Tensor
    """[C + 1] int32: first row of each chunk; unused entries repeat the number of live prefill rows."""
    chunk_kv_lens: Tensor
    """[C] int32: positions the chunk's last row sees (start + length); 0 for an unused chunk."""
    chunk_pages: Tensor
    """[C, M] int32: the chunk's block table; entries past its length are arbitrary valid pages."""
    decode_kv_lens: Tensor
    """[R] int32: positions the row sees, its own included; a padded row sees 1, in the trash page."""
    decode_pages: Tensor
    """[R, M] int32: the row's block table."""
