"""Any order of events against a model that keeps every request in a plain dictionary."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphgen.router.policy import Router
from graphgen.router.records import MAX_LOSSES, Choice, Loss, Refusal, RoutedRequest, RouterSettings
from tests.router.engines import CAPACITY, report, request

MAX_DIGESTS = 40


class Routing(RuleBasedStateMachine):
    """`at` says where each request is: an engine's id, or None where it was lost."""

    @initialize(count=st.integers(1, 9), seed=st.integers(0, 3))
    def begin(self, count: int, seed: int) -> None:
        self.settings = RouterSettings(max_digests=MAX_DIGESTS)
        self.routers = [Router(self.settings, seed) for _ in range(2)]
        """Two that are told the same."""
        self.now_s = 0.0
        self.num_requests = 0
        self.num_engines = 0
        self.at: dict[int, str | None] = {}
        self.losses: dict[int, int] = {}
        self.outputs: dict[int, int] = {}
        self.tenants: dict[int, str] = {}
        self.begun: set[int] = set()
        """Requests that got a token where they are."""
        self.status: dict[str, str] = {}
        self.draining: set[str] = set()
        self.epochs: dict[str, int] = {}
        for _ in range(count):
            self.join()

    def told(self, name: str, *arguments: object) -> object:
        first, second = (getattr(router, name)(*arguments) for router in self.routers)
        assert first == second, "equal calls and seeds give equal answers"
        return first

    def pick(self, data: st.DataObject, what: list[str] | list[int]) -> object:
        return data.draw(st.sampled_from(what))

    # --- engines ---------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.status) < 10)
    @rule()
    def join(self) -> None:
        engine_id = f"e{self.num_engines}"
        self.num_engines += 1
        self.told("joined", engine_id, CAPACITY, self.now_s)
        self.status[engine_id], self.epochs[engine_id] = "serving", 0

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        engine_id = str(self.pick(data, list(self.status)))
        self.lose(engine_id, self.told("left", engine_id))
        del self.status[engine_id], self.epochs[engine_id]
        self.draining.discard(engine_id)

    @precondition(lambda self: self.status)
    @rule(data=st.data(), drains=st.booleans())
    def drain(self, data: st.DataObject, drains: bool) -> None:
        engine_id = str(self.pick(data, list(self.status)))
        self.told("drain" if drains else "undrain", engine_id)
        (self.draining.add if drains else self.draining.discard)(engine_id)

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        engine_id = str(self.pick(data, list(self.status)))
        self.lose(engine_id, self.told("died", engine_id, self.now_s))
        self.status[engine_id] = "dead"

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        engine_id = str(self.pick(data, list(self.status)))
        self.epochs[engine_id] += 1
        self.told("renewed", engine_id, self.epochs[engine_id], self.now_s)
        self.begun -= {one for one, at in self.at.items() if at == engine_id}
        self.status[engine_id] = "serving"
        assert self.routers[0].view(engine_id).num_digests == 0

    @precondition(lambda self: self.status)
    @rule(
        data=st.data(),
        others=st.integers(0, 5),
        steps=st.integers(0, 2),
        serves=st.booleans(),
        is_new_life=st.booleans(),
    )
    def report(self, data: st.DataObject, others: int, steps: int, serves: bool, is_new_life: bool) -> None:
        engine_id = str(self.pick(data, list(self.status)))
        if self.status[engine_id] != "dead":
            self.epochs[engine_id] += is_new_life
            if is_new_life:
                self.begun -= {one for one, at in self.at.items() if at == engine_id}
            self.status[engine_id] = "any"  # serving, suspect or paused: the view says which
        num_open = sum(at == engine_id for at in self.at.values()) + others
        said = report(
            num_open,
            30 * num_open,
            5 * num_open,
            epoch=self.epochs[engine_id],
            num_steps=steps,
            is_serving=serves,
            num_others=others,
        )
        self.told("report", engine_id, said, self.now_s)

    @rule(passed_s=st.sampled_from([0.1, 1.5, 4.0, 20.0]))
    def watch(self, passed_s: float) -> None:
        self.now_s += passed_s
        losses = self.told("watch", self.now_s)
        assert isinstance(losses, tuple)
        for engine_id in {loss.engine_id for loss in losses}:
            self.lose(engine_id, tuple(loss for loss in losses if loss.engine_id == engine_id))

    def lose(self, engine_id: str, losses: object) -> None:
        """All of its requests, and no others."""
        assert isinstance(losses, tuple)
        assert {loss.request_id for loss in losses} == {one for one, at in self.at.items() if at == engine_id}
        for loss in losses:
            assert isinstance(loss, Loss)
            self.losses[loss.request_id] += 1
            assert loss.num_losses == self.losses[loss.request_id]
            self.at[loss.request_id] = None
            assert (loss.error != "") == (loss.num_losses == MAX_LOSSES)
            if loss.error:
                self.forget(loss.request_id)

    # --- requests --------------------------------------------------------------------------------------------

    @rule(
        prefix=st.integers(0, 3),
        others=st.lists(st.integers(0, 2), max_size=5),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(0, 2),
        deadline_ms=st.sampled_from([None, None, 1.0, 500.0]),
    )
    def send(self, prefix: int, others: list[int], tenant: str, priority: int, deadline_ms: float | None) -> None:
        asked = request(
            self.num_requests,
            prefix,
            *others,
            tenant=tenant,
            priority=priority,
            deadline_ms=deadline_ms,
            arrived_s=self.now_s,
        )
        self.num_requests += 1
        self.take(self.told("choose", asked, self.now_s), asked)

    @precondition(lambda self: None in self.at.values())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        request_id = self.pick(data, [one for one, at in self.at.items() if at is None])
        answer = self.told("move", request_id, self.now_s)
        assert not isinstance(answer, Refusal) or not self.eligible()
        self.take(answer, None)

    @precondition(lambda self: any(self.at.values()))
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        request_id = self.open_one(data)
        engine_id = self.at[request_id]
        answer = self.told("rejected", request_id, self.now_s)
        if answer is None:
            self.forget(request_id)
        else:
            assert isinstance(answer, Choice)
            assert answer.engine_id != engine_id
            self.take(answer, None)

    def take(self, answer: object, asked: RoutedRequest | None) -> None:
        """It goes to one engine that takes requests, or is refused with a reason."""
        eligible = self.eligible()
        if isinstance(answer, Refusal):
            assert answer.message
            assert not eligible or (asked is not None and asked.deadline_ms is not None)
            return
        assert isinstance(answer, Choice)
        assert answer.engine_id in eligible
        request_id = answer.request.request_id
        assert answer.num_losses == self.losses.get(request_id, 0)
        self.told("sent", answer)
        self.at[request_id] = answer.engine_id
        self.begun.discard(request_id)
        self.tenants[request_id] = answer.request.tenant
        self.losses.setdefault(request_id, 0)
        self.outputs.setdefault(request_id, 0)

    def eligible(self) -> set[str]:
        """Those that serve and do not drain; where there is none, those that are suspect."""
        views = [view for view in self.routers[0].views() if view.engine_id not in self.draining]
        serving = {view.engine_id for view in views if view.status == "serving"}
        return serving or {view.engine_id for view in views if view.status == "suspect"}

    @precondition(lambda self: any(self.at.values()))
    @rule(data=st.data(), cached=st.integers(0, 6), count=st.integers(1, 4), is_first=st.booleans())
    def get_tokens(self, data: st.DataObject, cached: int, count: int, is_first: bool) -> None:
        request_id = self.open_one(data)
        if is_first:
            self.told("first_token", request_id, cached * 16, self.now_s)
            self.outputs[request_id] += request_id not in self.begun
        else:
            self.outputs[request_id] += count
            self.told("progress", request_id, self.outputs[request_id], self.now_s)
        self.begun.add(request_id)
        self.losses[request_id] = 0

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request_id = self.pick(data, list(self.at))
        assert isinstance(request_id, int)
        self.told("finished", request_id, self.outputs[request_id])
        self.forget(request_id)

    def open_one(self, data: st.DataObject) -> int:
        request_id = self.pick(data, [one for one, at in self.at.items() if at is not None])
        assert isinstance(request_id, int)
        return request_id

    def forget(self, request_id: int) -> None:
        del self.at[request_id], self.losses[request_id], self.outputs[request_id]

    # --- what always holds -----------------------------------------------------------------------------------

    @invariant()
    def counts_are_exact(self) -> None:
        router = self.routers[0]
        assert router.num_open == len(self.at)
        for view in router.views():
            num_open = sum(at == view.engine_id for at in self.at.values())
            assert view.num_open == num_open
            tenants = {self.tenants[one] for one, at in self.at.items() if at == view.engine_id}
            assert view.num_tenants == len(tenants)
            assert view.epoch == self.epochs[view.engine_id]
            assert view.is_draining == (view.engine_id in self.draining)
            assert min(view.prompt_tokens, view.output_tokens, view.num_others) >= 0
            if not num_open:
                assert view.prompt_tokens == view.output_tokens == 0
            if view.status == "dead":
                assert num_open == view.num_digests == 0

    @invariant()
    def the_index_is_bounded(self) -> None:
        views = self.routers[0].views()
        assert sum(view.num_digests for view in views) == self.routers[0].num_digests <= MAX_DIGESTS
        assert all(view.num_digests <= CAPACITY.num_pages for view in views)


Routing.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
test_any_order_of_events = Routing.TestCase
