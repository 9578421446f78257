"""A worker that replaces one that died waits until the memory of that one is free."""

import pytest

from graphgen import ConfigError
from graphgen.capture.memory import wait_until_free

GIB = 2**30


def test_memory_that_is_still_being_freed_is_waited_for() -> None:
    free = iter([1 * GIB, 3 * GIB, 9 * GIB, 10 * GIB])
    assert wait_until_free(8 * GIB, lambda: next(free), timeout_s=5.0) == 9 * GIB


def test_nothing_is_waited_for_where_nobody_knows_what_is_needed() -> None:
    assert wait_until_free(0, lambda: 0, timeout_s=0.0) == 0


def test_memory_that_another_program_took_is_an_error_with_the_figures() -> None:
    with pytest.raises(ConfigError, match=r"2\.00 GiB of the device are free after 0\.05 s.* used 8\.00 GiB"):
        wait_until_free(8 * GIB, lambda: 2 * GIB, timeout_s=0.05)
