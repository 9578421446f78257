"""The engines of a cluster: how lost ones are replaced and spare ones leave, with faults in any order."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from graphgen.cluster.roster import UNSERVED_S, Action, Add, Address, End, Remove, Roster, Seen, Start, View
from graphgen.cluster.scaling import Load, Scaling, ScalingLimits
from graphgen.launch.starts import LONGEST_WAIT_S, MAX_STARTS, WITHIN_S

BUSY = Load(0, 5, 0.7, 1, 8)
"""At which the number of engines stays what it is."""
IDLE = Load(0, 0, 0.0, 2, 8)


class World:
    """Nodes and a frontend that do what they are told, and what was told them."""

    def __init__(self, least: int = 1, most: int = 1, count: int | None = None) -> None:
        limits = ScalingLimits(least=least, most=most, up_after_s=0.0, down_after_s=0.0)
        self.scaling = Scaling(limits, most if count is None else count)
        self.scaling.engine_started(0.0)
        self.roster = Roster(self.scaling, grace_s=30.0)
        self.now_s = 1000.0
        self.seen: dict[int, Seen] = {}
        self.routed: dict[str, bool] | None = {}
        self.draining: set[str] = set()
        self.lives = 0
        self.done: list[Action] = []

    def look(self, load: Load = BUSY, seconds: float = 1.0) -> list[Action]:
        self.now_s += seconds
        view = None if self.routed is None else View(dict(self.routed), load)
        actions = self.roster.advance(self.now_s, dict(self.seen), view)
        for action in actions:
            self._do(action)
        self.done += actions
        return actions

    def _do(self, action: Action) -> None:
        match action:
            case Start(number=number):
                assert number not in self.seen, "its last life is gone"
                self.lives += 1
                self.seen[number] = Seen("placing")
            case End(number=number):
                address = self.seen[number].address
                assert (
                    address is None or self.seen[number].state == "lost" or address.data not in (self.routed or {})
                ), "the frontend sends it nothing more"
                self.seen[number] = Seen("ending")
            case Add(address=address):
                if self.routed is not None:
                    self.routed[address.data] = True
            case Remove(address=data):
                assert self.routed is not None
                assert data in self.routed
                self.draining.add(data)

    def look_until_one_drains(self) -> None:
        for _ in range(99):
            if self.draining:
                return
            self.look(IDLE)
        raise AssertionError("it is idle")

    def go_on(self) -> None:
        """Everything that is on its way arrives."""
        for number, seen in list(self.seen.items()):
            if seen.state == "ending":
                del self.seen[number]
            elif seen.state == "placing":
                self.seen[number] = Seen("starting", f"node-{number}")
            elif seen.state == "starting":
                data = f"tcp://node-{number}:{self.lives}{number}"
                self.seen[number] = Seen("serving", f"node-{number}", Address(data, data, "key", 8))
        for data in self.draining:
            (self.routed or {}).pop(data, None)
        self.draining.clear()

    def settle(self, looks: int = 12, seconds: float = 1.0) -> None:
        for _ in range(looks):
            self.look(seconds=seconds)
            self.go_on()

    def lose(self, number: int, reason: str = "it was killed") -> None:
        self.seen[number] = Seen("lost", reason=reason)

    @property
    def addresses(self) -> list[str]:
        """To which the frontend sends requests."""
        return list(self.routed or {})

    @property
    def states(self) -> list[str]:
        return [one.state for one in self.roster.status(self.now_s)]


def kinds(actions: Sequence[Action]) -> list[type]:
    return [type(one) for one in actions]


def test_an_engine_is_placed_started_and_routed_to() -> None:
    world = World(most=2, least=2)
    assert world.look() == [Start(0), Start(1)]
    assert world.states == ["placing", "placing"]
    world.settle()
    assert world.states == ["serving", "serving"]
    assert len(world.routed or ()) == 2
    assert world.look() == []


def test_a_lost_engine_is_ended_before_it_is_started_again_and_its_new_address_replaces_the_old() -> None:
    world = World()
    world.settle()
    [old] = world.addresses
    world.lose(0, "its node died")
    assert kinds(world.look()) == [End, Remove]
    assert world.states == ["waiting"]
    assert world.look() == [Remove(old, 0.0)], "what is left of it may hold a device"
    world.settle()
    [new] = world.addresses
    assert new != old
    status = world.roster.status(world.now_s)[0]
    assert (status.restarts, status.problem, status.address) == (1, "", new)
    assert any("its node died" in line for line in world.roster.news)


def test_starts_that_lead_to_nothing_are_limited_and_come_slower() -> None:
    world = World()
    starts = []
    for _ in range(int(WITHIN_S)):
        if Start(0) in world.look():
            starts.append(world.now_s)
            world.lose(0, "no such model")
        else:
            world.seen.clear()
    assert len(starts) == MAX_STARTS
    gaps = [after - before for before, after in pairwise(starts)]
    assert gaps == sorted(gaps)
    assert world.roster.losses() == ["engine 0: no such model"]
    world.settle(looks=int(WITHIN_S))
    assert world.states == ["serving"], "it is tried again when those are long enough ago"


def test_an_engine_that_serves_is_drained_before_it_is_ended() -> None:
    world = World(least=1, most=2)
    world.settle()  # both serve
    world.look_until_one_drains()
    (data,) = world.draining
    assert world.states == ["serving", "draining"], "the younger one goes"
    assert data == world.roster.status(world.now_s)[1].address
    assert kinds(world.look()) == [Remove], "again, in case that the frontend was started anew"
    world.go_on()
    assert world.look() == [End(1)]
    world.go_on()
    world.look()
    assert world.states == ["serving"]


def test_one_that_does_not_drain_is_ended_after_its_grace() -> None:
    world = World(least=1, most=2)
    world.settle()
    world.look_until_one_drains()
    (data,) = world.draining
    world.draining.clear()
    assert End(1) not in world.look(seconds=80.0)
    del (world.routed or {})[data]  # for the check of this world alone: it is ended although it is routed to
    assert End(1) in world.look(seconds=20.0)


def test_a_spare_engine_that_does_not_serve_yet_goes_first() -> None:
    world = World(least=1, most=3, count=3)
    world.look()
    world.go_on()
    world.look()
    world.seen[1] = Seen("serving", "node-1", Address("tcp://b:1", "tcp://b:2", "key", 8))
    world.look()
    for _ in range(20):
        world.look(Load(0, 0, 0.0, 1, 8))
    assert world.states == ["ending", "serving", "ending"]
    world.settle()
    assert [(one.number, one.state) for one in world.roster.status(world.now_s)] == [(1, "serving")]


def test_a_frontend_that_was_started_anew_learns_every_engine() -> None:
    world = World(least=2, most=2)
    world.settle()
    world.routed = None
    assert world.look() == []
    world.routed = {"tcp://stale:1": True}
    actions = world.look()
    assert sorted(map(str, kinds(actions))) == sorted(map(str, [Add, Add, Remove]))


def test_an_engine_that_the_frontend_cannot_use_is_replaced() -> None:
    world = World()
    world.settle()
    [data] = world.addresses
    (world.routed or {})[data] = False
    world.look(seconds=UNSERVED_S / 2)
    assert world.states == ["serving"]
    (world.routed or {})[data] = True
    world.look()
    (world.routed or {})[data] = False
    world.look(seconds=UNSERVED_S - 1)
    assert world.states == ["serving"], "it counts from the last moment at which it could be used"
    world.seen[0] = Seen("lost")  # so that this world lets it be ended
    world.look(seconds=2)
    assert world.states == ["waiting"]


class Faults(RuleBasedStateMachine):
    """Whatever fails in whatever order: no engine too many, and in the end all that are wanted serve."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(least=1, most=4, count=2)

    @rule(waiting=st.sampled_from([0, 0, 100]), running=st.integers(0, 20), kv=st.sampled_from([0.0, 0.5, 0.95]))
    def look(self, waiting: int, running: int, kv: float) -> None:
        serving = len(self.world.roster.serving())
        self.world.look(Load(waiting, running, kv, serving, 8))

    @rule()
    def go_on(self) -> None:
        self.world.go_on()

    @rule(number=st.integers(0, 3))
    def lose(self, number: int) -> None:
        if number in self.world.seen and self.world.seen[number].state != "ending":
            self.world.lose(number)

    @rule()
    def frontend_dies(self) -> None:
        self.world.routed = None
        self.world.draining.clear()

    @rule()
    def frontend_comes_back(self) -> None:
        if self.world.routed is None:
            self.world.routed = {}

    @invariant()
    def never_more_lives_than_the_limit(self) -> None:
        assert len([one for one in self.world.seen.values() if one.state not in ("lost", "ending")]) <= 4

    @invariant()
    def requests_go_only_to_engines_that_are_known(self) -> None:
        known = {one.address for one in self.world.roster.status(self.world.now_s)}
        stale = set(self.world.routed or ()) - known
        self.world.look(seconds=0.0)
        assert stale <= self.world.draining, "what is no longer there is taken from the frontend at the next look"

    def teardown(self) -> None:
        self.frontend_comes_back()
        world = self.world
        for _ in range(40):
            world.look(seconds=LONGEST_WAIT_S)
            world.go_on()
        assert world.states == ["serving"] * world.roster.num_wanted
        assert set(world.routed or ()) == {one.data for one in world.roster.serving()}
        assert set(world.seen) == {one.number for one in world.roster.status(world.now_s)}


TestFaults = pytest.mark.filterwarnings("default")(Faults.TestCase)
TestFaults.settings = settings(max_examples=30, stateful_step_count=25)
