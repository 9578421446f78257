"""Bad bytes never end the server, never cost a good request, and never stay in memory. The long run is `fuzz.py`."""

from tests.frontend.fuzz import fuzz
from tests.frontend.harness import Frontend


def test_mutated_messages_and_garbage_do_no_harm(frontend: Frontend) -> None:
    grown = fuzz(frontend, num_messages=4000, seed=1)
    assert grown < 64 << 20
    assert frontend.server._monitor.messages_refused > 1000
    assert frontend.thread.is_alive()
