"""A short soak: nothing of a request stays in any process of a server. Slopes of memory take `python -m tests.soak`."""

from tests import soak


def test_nothing_of_ended_requests_stays_in_a_server_whose_worker_dies_twice() -> None:
    table = soak.run(total_s=15.0, seed=3, num_pauses=2)
    assert {line.split()[0] for line in table[1:-1]} == {"client", *soak.MODULES}
    assert all(f"'{kind.__name__}'" in table[-1] for kind in soak.KINDS), table[-1]
