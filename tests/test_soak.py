"""A short soak: nothing of a request stays in any process of a server. Slopes of memory take `python -m tests.soak`."""

import random

from tests import soak


def test_nothing_of_ended_requests_stays_in_a_server_whose_worker_dies_twice() -> None:
    table, _ = soak.run(total_s=15.0, seed=3, num_pauses=2)
    assert {line.split()[0] for line in table[1:-1]} == {"client", *soak.MODULES}
    assert all(f"'{kind.__name__}'" in table[-1] for kind in soak.KINDS), table[-1]


def test_a_process_that_grows_is_named() -> None:
    memory, hour_s = soak.Memory(window_s=30.0), 3600.0
    for seconds in range(0, int(hour_s), 30):
        growth = 1.2 * seconds / hour_s
        memory.take("frontend", 1, soak.Sample(seconds, 18.0 + growth))
        memory.take("scheduler", 2, soak.Sample(seconds, 18.0 + min(growth, 0.1) + 0.05 * (seconds % 60)))
        if seconds < soak.BOUND_FROM_S:
            memory.take("worker", 3, soak.Sample(seconds, 200.0 + 40.0 * growth))
    assert memory.growing(hour_s) == ["frontend 1: 1.20 MiB/h"], "the worker was not there for long enough"
    assert memory.table(hour_s)[1].split()[-1] == "1.20"


def test_what_steps_take_for_a_moment_hides_no_growth_and_is_none() -> None:
    memory, chance, total_s = soak.Memory(window_s=18.0), random.Random(0), 1800.0
    for look in range(int(total_s / soak.LOOK_S)):
        seconds = look * soak.LOOK_S
        step_mib = chance.uniform(0.0, 5.0)
        memory.take("worker", 1, soak.Sample(seconds, 200.0 + step_mib))
        memory.take("worker", 2, soak.Sample(seconds, 200.0 + step_mib + 2.0 * seconds / 3600.0))
    (named,) = memory.growing(total_s)
    assert named.startswith("worker 2")
