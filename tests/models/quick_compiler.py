"""What inductor makes for the CPU, without the seconds that the C++ compiler spends on its speed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch._inductor import cpu_vec_isa


@contextmanager
def quick_compiler() -> Iterator[None]:
    """Compiles within it, in any thread, are not optimised, nor is the machine asked which vector instructions it has,
    by building a dozen libraries. The graphs, their number and what they compute are the same.

    (inductor's own settings would hold in one thread alone.)
    """
    with (
        mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", return_value=[]),
        mock.patch.dict(os.environ, TORCHINDUCTOR_DEBUG_COMPILE="1"),
    ):
        yield
