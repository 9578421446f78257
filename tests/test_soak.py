"""A short soak: nothing of a request stays in any process of a server. Slopes of memory take `python -m tests.soak`."""

from tests import soak


def test_nothing_of_ended_requests_stays_in_a_server_whose_worker_dies_twice() -> None:
    table, _ = soak.run(total_s=15.0, seed=3, num_pauses=2)
    assert {line.split()[0] for line in table[1:-1]} == {"client", *soak.MODULES}
    assert all(f"'{kind.__name__}'" in table[-1] for kind in soak.KINDS), table[-1]


def test_a_process_that_grows_is_named() -> None:
    memory, hour_s = soak.Memory(), 3600.0
    for seconds in range(0, int(hour_s), 30):
        growth = 1.2 * seconds / hour_s
        memory.samples["frontend", 1].append(soak.Sample(seconds, 18.0 + growth))
        memory.samples["scheduler", 2].append(soak.Sample(seconds, 18.0 + min(growth, 0.1) + 0.05 * (seconds % 60)))
        if seconds < soak.BOUND_FROM_S:
            memory.samples["worker", 3].append(soak.Sample(seconds, 200.0 + 40.0 * growth))
    assert memory.growing(hour_s) == ["frontend 1: 1.20 MiB/h"], "the worker was not there for long enough"
    assert memory.table(hour_s)[1].split()[-1] == "1.20"
