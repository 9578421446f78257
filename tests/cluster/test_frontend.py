"""What a frontend says of engines elsewhere, as a cluster reads it."""

from graphgen.cluster.frontend import view_of
from graphgen.ipc.ggp.messages import Stats
from graphgen.server.operator import Told
from tests.cluster.stats import engine, stats_of

SLOTS = {"tcp://a:1": 4, "tcp://b:1": 3, "tcp://d:1": 2}


def view(told: Told, stats: Stats) -> tuple[object, ...]:
    found = view_of(told, stats, SLOTS)
    load = found.load
    assert load is not None
    return dict(found.engines), load.num_waiting, load.num_running, round(load.kv_usage, 3), load.num_serving


def test_counts_of_several_engines_are_by_address() -> None:
    told = Told(
        ("serving", "away", "removed", "draining"), addresses=("tcp://a:1", "tcp://b:1", "tcp://c:1", "tcp://d:1")
    )
    stats = stats_of([engine(3, 2, 40), engine(0, 0, 100, False), engine(9, 9, 0), engine(1, 1, 80)], held=5)
    found = view_of(told, stats, SLOTS)
    assert view(told, stats)[0] == {"tcp://a:1": True, "tcp://b:1": False, "tcp://d:1": False}
    assert found.load is not None
    assert found.load.num_slots == 4, "of the engine that serves"
    assert (found.load.num_waiting, found.load.num_running, found.load.num_serving) == (2 + 5, 3, 1)
    assert found.load.kv_usage == 0.6, "of the engine that serves"
    assert found.loads["tcp://d:1"].num_running == 1
    assert found.num_held == 5


def test_one_engine_has_the_counts_of_all() -> None:
    told = Told(("serving",), addresses=("tcp://a:1",))
    assert view(told, stats_of([], held=1, running=2, waiting=3, free=25)) == ({"tcp://a:1": True}, 4, 2, 0.75, 1)


def test_an_engine_that_was_added_a_moment_ago_has_no_counts_yet() -> None:
    told = Told(("serving", "serving"), addresses=("tcp://a:1", "tcp://b:1"))
    assert view(told, stats_of([engine(1, 0, 50)])) == ({"tcp://a:1": True, "tcp://b:1": True}, 0, 1, 0.5, 2)


def test_engines_are_known_without_counts() -> None:
    """A frontend whose engines are all gone lets nobody in, and must learn of those that replace them."""
    told = Told(("away", "serving"), addresses=("tcp://a:1", "tcp://b:1"))
    found = view_of(told, None, SLOTS)
    assert found.engines == {"tcp://a:1": False, "tcp://b:1": True}
    assert found.load is None


def test_of_engines_that_differ_the_fewest_slots_count() -> None:
    """One that an operator has added by hand is known by its address alone."""
    told = Told(("serving",) * 3, addresses=("tcp://a:1", "tcp://b:1", "tcp://by-hand:1"))
    load = view_of(told, stats_of([engine(1, 0, 50)] * 3), SLOTS).load
    assert load is not None
    assert (load.num_serving, load.num_slots) == (3, 3)
