"""What collections of a process that serves look at."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from graphgen.base.garbage import leave_imports_alone


class Ring:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_there_is_left_alone_garbage_is_not_and_later_garbage_is_found() -> None:
    dropped = weakref.ref(Ring())
    kept = [Ring() for _ in range(1000)]
    leave_imports_alone()
    assert dropped() is None
    assert gc.get_freeze_count() > len(kept)
    assert len(gc.get_objects()) < len(kept)
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None
