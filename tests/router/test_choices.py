"""Where requests go, and why some go nowhere."""

from collections import Counter

import pytest

from graphgen.router.load import EngineLoad
from graphgen.router.policy import Router
from graphgen.router.records import Capacity, Choice, Loss, Refusal, RouterSettings
from tests.router.engines import CAPACITY, PAGE, report, request, router_of, send, tell

SHARED = (1, 2, 3, 4)


def serve(router: Router, request_id: int, cached_tokens: int = 0, num_output: int = 10) -> None:
    """From its first to its last token."""
    router.first_token(request_id, cached_tokens, 0.0)
    router.finished(request_id, num_output)


@pytest.mark.parametrize("count", [3, 20])
def test_a_conversation_stays_with_the_engine_that_keeps_it(count: int) -> None:
    router = router_of(count)
    first = send(router, request(0, *SHARED))
    serve(router, 0)
    for turn in range(1, 30):
        pages = (*SHARED, *range(10, 10 + turn))
        assert send(router, request(turn, *pages)) == first
        serve(router, turn, (len(pages) - 1) * PAGE)


def test_a_prefix_that_everybody_asks_for_spreads_over_the_engines() -> None:
    router = router_of(20)
    engines = Counter(send(router, request(number, *SHARED)) for number in range(400))
    assert len(engines) == 20
    assert max(engines.values()) < 2 * min(engines.values())


def test_a_hot_engine_is_left_when_computing_the_prompt_elsewhere_is_cheaper() -> None:
    router = router_of(2)
    holder = send(router, request(0, *SHARED))
    serve(router, 0)
    other = next(view.engine_id for view in router.views() if view.engine_id != holder)
    # Four pages are 64 ms of computing; other routers' work of 50 ms does not outweigh them, of 100 ms does.
    tell(router, holder, report(1, 50))
    assert send(router, request(1, *SHARED)) == holder
    router.finished(1, 0)
    tell(router, holder, report(1, 100))
    assert send(router, request(2, *SHARED)) == other


def test_without_prefixes_the_load_is_even() -> None:
    router = router_of(50)
    engines = Counter(send(router, request(number)) for number in range(50 * 20))
    assert len(engines) == 50
    assert max(engines.values()) <= 20 + 6, "the better of two at random: nobody is far above the mean"


def test_an_engine_that_had_given_the_prompt_up_loses_what_is_older() -> None:
    router = router_of(1)
    for number, page in enumerate([5, 6, 7]):
        send(router, request(number, page, page, page, page))
        serve(router, number)
    send(router, request(3, 6, 6, 6, 6))
    serve(router, 3, cached_tokens=PAGE)
    kept = {}
    for page in (5, 6, 7):
        choice = router.choose(request(4, page, page, page, page), 0.0)
        assert isinstance(choice, Choice)
        kept[page] = choice.num_cached // PAGE
    assert kept == {5: 0, 6: 4, 7: 4}


def test_a_prompt_that_was_still_being_computed_is_no_sign_of_anything_given_up() -> None:
    router = router_of(1)
    for number, pages in enumerate([(7, 7), SHARED, SHARED]):
        send(router, request(number, *pages))
    router.first_token(0, 0, 0.0)
    router.first_token(1, 0, 0.0)
    router.first_token(2, PAGE, 0.0)  # began beside the one before
    assert router.view("e0").num_digests == 6


def test_a_slow_engine_gets_as_much_less_as_it_is_slower() -> None:
    router = router_of(2)
    router.report("e1", report(pace=3.0), 0.0)
    engines = Counter(send(router, request(number)) for number in range(200))
    assert engines["e0"] == pytest.approx(150, abs=3)


def test_what_other_routers_sent_counts_by_the_last_report() -> None:
    router = router_of(2)
    tell(router, "e0", report(num_open=10, prompt_tokens=1000, output_tokens=100))
    assert router.view("e0").num_others == 10
    # A second and two tenths of others' work: about 43 of these requests, 28 ms each, go to the other engine first.
    engines = [send(router, request(number)) for number in range(60)]
    assert engines[:40] == ["e1"] * 40
    assert "e0" in engines


def test_its_own_requests_are_not_taken_for_those_of_others() -> None:
    router = router_of(1)
    for number in range(5):
        send(router, request(number))
    before_s = router.view("e0").open_work_s
    router.report("e0", report(num_open=5, prompt_tokens=40, output_tokens=50, num_others=0), 0.0)
    assert router.view("e0").num_others == 0
    assert router.view("e0").open_work_s == before_s


def test_beside_a_tenant_that_floods_all_engines_another_goes_where_it_has_least_itself() -> None:
    """Engines serve tenants in turns: a flood delays another tenant by no more than what that one has to do itself."""
    router = router_of(2)
    router.drain("e1")
    for number in range(50):  # 28 ms each
        send(router, request(number, tenant="greedy"))
    router.undrain("e1")
    router.drain("e0")
    for number in range(10):
        send(router, request(100 + number, tenant="greedy"))
    for number in range(30):
        send(router, request(200 + number, tenant="modest"))
    router.undrain("e0")
    loads = [view.open_work_s for view in router.views()]
    assert loads[0] > loads[1], "e0 has more to do, but nothing for the modest one"
    assert send(router, request(300, tenant="modest")) == "e0"
    assert send(router, request(301, tenant="greedy")) == "e1"


def test_a_new_engine_gets_prompts_that_nobody_keeps() -> None:
    router = router_of(100)
    for number in range(2000):
        send(router, request(number, number, number, number))
        serve(router, number)
    router.joined("new", CAPACITY, 0.0)
    router.report("new", report(), 0.0)
    engines = Counter[str]()
    for number in range(3000, 3200):
        engines[send(router, request(number, number, number))] += 1
        serve(router, number)
    assert engines["new"] > 5 * 200 / 101, "more than chance would give it"
    assert router.view("new").num_digests > 0


# --- refusing ------------------------------------------------------------------------------------------------------


def loaded(count: int) -> Router:
    """Each engine has about ten seconds of prompts."""
    router = router_of(count)
    for number in range(10 * count):
        send(router, request(number, tail=1000))
    return router


@pytest.mark.parametrize("count", [3, 40])
def test_a_deadline_that_no_engine_meets_is_refused_with_a_time_to_come_back(count: int) -> None:
    router = loaded(count)
    answer = router.choose(request(1000, deadline_ms=2000.0), 0.0)
    assert isinstance(answer, Refusal)
    assert answer.error == "OverloadedError"
    assert "deadline_ms is 2000" in answer.message
    assert answer.retry_after_s is not None
    assert 4.0 < answer.retry_after_s < 16.0
    assert router.num_open == 10 * count
    assert isinstance(router.choose(request(1001, deadline_ms=60_000.0), 0.0), Choice)
    assert isinstance(router.choose(request(1002), 0.0), Choice)


def test_a_deadline_that_not_even_an_idle_engine_meets_says_so() -> None:
    answer = router_of(3).choose(request(0, tail=1000, deadline_ms=900.0), 0.0)
    assert isinstance(answer, Refusal)
    assert answer.error == "DeadlineError"
    assert answer.retry_after_s is None


def test_time_that_passed_before_the_choice_counts() -> None:
    router = router_of(3)
    asked = request(0, tail=500, deadline_ms=1000.0, arrived_s=5.0)
    assert isinstance(router.choose(asked, 5.1), Choice)
    assert isinstance(router.choose(asked, 5.9), Refusal)


def test_a_late_engine_that_keeps_the_prompt_is_passed_by_for_one_in_time() -> None:
    router = router_of(2)
    holder = send(router, request(0, *range(60)))
    serve(router, 0)
    other = next(view.engine_id for view in router.views() if view.engine_id != holder)
    tell(router, holder, report(1, 800))
    assert router.choose(request(1, *range(60)), 0.0).engine_id == holder  # type: ignore[union-attr]
    choice = router.choose(request(2, *range(60), deadline_ms=800.0), 0.0)
    assert isinstance(choice, Refusal), "computing takes a second elsewhere, and 0.8 s of others' work goes before here"
    tell(router, holder, report(1, 1300))
    choice = router.choose(request(3, *range(60), deadline_ms=1300.0), 0.0)
    assert isinstance(choice, Choice)
    assert choice.engine_id == other


@pytest.mark.parametrize("sheds", [True, False])
def test_a_late_first_token_is_refused_only_where_that_is_asked_for(sheds: bool) -> None:
    router = Router(RouterSettings(shed_late_first_tokens=sheds))
    router.joined("e0", CAPACITY, 0.0)
    tell(router, "e0", report(num_open=3, prompt_tokens=3000, num_tenants=9))
    answer = router.choose(request(0, ttft_target_ms=500.0, tenant="a"), 0.0)
    assert isinstance(answer, Choice), "engines serve other tenants' prompts in turn with its own"
    for number in range(3):
        send(router, request(1 + number, tail=1000))
    answer = router.choose(request(9, ttft_target_ms=500.0), 0.0)
    assert isinstance(answer, Refusal) == sheds
    if isinstance(answer, Refusal):
        assert "ttft_target_ms is 500" in answer.message


def test_an_engine_whose_speed_nobody_knows_refuses_nothing() -> None:
    router = Router()
    router.joined("e0", CAPACITY, 0.0)
    for number in range(100):
        send(router, request(number, tail=1000))
    assert isinstance(router.choose(request(1000, deadline_ms=1.0), 0.0), Choice)


def test_who_is_turned_away_tries_other_engines_and_then_hears_of_it() -> None:
    router = router_of(20)
    tried = [send(router, request(0, *SHARED))]
    while (choice := router.rejected(0, 0.0)) is not None:
        router.sent(choice)
        tried.append(choice.engine_id)
    assert len(tried) == len(set(tried)) == 3
    assert router.num_open == 0


def test_an_engine_that_had_no_room_once_takes_a_request_whose_next_engine_died() -> None:
    router = router_of(2)
    first = send(router, request(0))
    choice = router.rejected(0, 0.0)
    assert choice is not None
    router.sent(choice)
    router.died(choice.engine_id, 0.0)
    moved = router.move(0, 0.0)
    assert isinstance(moved, Choice)
    assert moved.engine_id == first


def test_an_engine_that_joins_is_not_taken_for_one_that_left_and_had_no_room() -> None:
    router = router_of(2)
    first = send(router, request(0))
    choice = router.rejected(0, 0.0)
    assert choice is not None
    router.sent(choice)
    router.left(first)
    router.joined("new", CAPACITY, 0.0)
    choice = router.rejected(0, 0.0)
    assert choice is not None
    assert choice.engine_id == "new"


def test_without_an_engine_the_reason_is_told() -> None:
    router = Router()
    answer = router.choose(request(0), 0.0)
    assert isinstance(answer, Refusal)
    assert (answer.error, "none has joined" in answer.message) == ("EngineDeadError", True)
    router = router_of(3)
    router.drain("e0")
    router.died("e1", 0.0)
    router.report("e2", report(is_serving=False), 0.0)
    answer = router.choose(request(0), 0.0)
    assert isinstance(answer, Refusal)
    assert answer.error == "OverloadedError"
    assert "1 draining, 1 dead, 1 paused" in answer.message


# --- what it costs -------------------------------------------------------------------------------------------------


def test_a_choice_looks_at_few_engines_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = Capacity(256, 1000, PAGE, 512)
    router = router_of(1000, capacity=capacity)
    for number in range(3000):
        send(router, request(number, *SHARED, number % 50))
    looks = Counter[str]()

    def counted(name: str) -> None:
        real = getattr(EngineLoad, name)

        def call(*arguments: object) -> object:
            looks[name] += 1
            return real(*arguments)

        monkeypatch.setattr(EngineLoad, name, call)

    for name in ("cost_s", "first_token_s"):
        counted(name)
    router.choose(request(9999, *SHARED, 7), 0.0)
    assert 3 <= looks["cost_s"] <= 7
    looks.clear()
    answer = router.choose(request(9998, *SHARED, 7, deadline_ms=1.0), 0.0)
    assert isinstance(answer, Refusal)
    assert looks["cost_s"] + looks["first_token_s"] <= 7 + 7 + 8 + 3, "refusing costs little more than choosing"


# --- what is lost --------------------------------------------------------------------------------------------------


def only(losses: tuple[Loss, ...]) -> Loss:
    (loss,) = losses
    return loss


def test_a_request_goes_on_elsewhere_with_its_tokens_and_fails_with_the_third_engine() -> None:
    router = router_of(5)
    engine_id = send(router, request(0, *SHARED))
    router.first_token(0, 0, 0.0)
    router.progress(0, 6, 0.0)
    assert router.view(engine_id).prompt_tokens == 0
    assert only(router.died(engine_id, 0.0)).num_losses == 1
    choice = router.move(0, 0.0)
    assert isinstance(choice, Choice)
    assert (choice.num_losses, choice.is_alone) == (1, False)
    assert choice.engine_id != engine_id
    router.sent(choice)
    view = router.view(choice.engine_id)
    assert (view.prompt_tokens, view.output_tokens) == (4 * PAGE + 8 + 6, 10 - 6)
    router.progress(0, 7, 0.0)  # a new token: what was lost before does not count any more
    for num_losses in (1, 2):
        loss = only(router.died(choice.engine_id, 0.0))
        assert (loss.num_losses, loss.error) == (num_losses, "")
        choice = router.move(0, 0.0)
        assert isinstance(choice, Choice)
        assert (choice.num_losses, choice.is_alone) == (num_losses, num_losses == 2)
        router.sent(choice)
    loss = only(router.died(choice.engine_id, 0.0))
    assert "3 engines ended" in loss.error
    assert router.num_open == 0


def test_one_that_runs_alone_goes_where_the_fewest_have_to_wait_for_it() -> None:
    router = router_of(4)
    send(router, request(0))
    for _ in range(2):
        at = next(view.engine_id for view in router.views() if view.num_open)
        router.left(at)
        busy = router.views()[0].engine_id
        router.report(busy, report(num_open=1, prompt_tokens=5000), 0.0)
        for view in router.views()[1:]:
            router.report(view.engine_id, report(num_open=20, prompt_tokens=20), 0.0)
        choice = router.move(0, 0.0)
        assert isinstance(choice, Choice)
        assert (choice.engine_id == busy) == choice.is_alone == (choice.num_losses == 2)
        router.sent(choice)


def test_an_engine_that_says_nothing_gets_nothing_and_then_loses_its_requests() -> None:
    router = router_of(2)
    send(router, request(0))
    at = next(view.engine_id for view in router.views() if view.num_open)
    other = {"e0": "e1", "e1": "e0"}[at]
    now_s = 0.0
    while now_s < 14.0:
        now_s += 0.5
        router.report(other, report(), now_s)
        assert router.watch(now_s) == ()
        assert router.view(at).status == ("suspect" if now_s > 1.0 else "serving")
        assert send(router, request(int(now_s * 10)), now_s) == other or now_s <= 1.0
    router.report(other, report(), 17.0)
    assert only(tuple(loss for loss in router.watch(17.0) if loss.request_id == 0)).engine_id == at
    router.report(at, report(num_steps=5), 17.1)
    assert router.view(at).status == "serving"


def test_an_engine_with_requests_that_runs_no_step_is_suspect_until_it_runs_one() -> None:
    router = router_of(2)
    for tenth in range(1, 40):
        router.report("e0", report(num_open=2, num_steps=7), tenth / 10)
        router.report("e1", report(num_open=0, num_steps=7), tenth / 10)
        router.watch(tenth / 10)
    assert (router.view("e0").status, router.view("e1").status) == ("suspect", "serving")
    router.report("e0", report(num_open=2, num_steps=8), 4.0)
    assert router.view("e0").status == "serving"


def test_requests_of_a_paused_engine_wait_only_where_nobody_else_serves() -> None:
    router = router_of(2)
    router.drain("e1")
    send(router, request(0, *SHARED))
    router.report("e0", report(num_open=1, is_serving=False), 0.0)
    assert router.watch(5.0) == ()
    router.undrain("e1")
    router.report("e1", report(), 5.0)
    assert only(router.watch(5.1)).request_id == 0
    choice = router.move(0, 5.1)
    assert isinstance(choice, Choice)
    assert choice.engine_id == "e1"


def test_a_new_epoch_empties_the_cache_and_its_requests_begin_again_in_place() -> None:
    router = router_of(1)
    send(router, request(0, *SHARED))
    router.first_token(0, 0, 0.0)
    assert (router.view("e0").prompt_tokens, router.view("e0").num_digests) == (0, 4)
    router.report("e0", report(1, epoch=1), 1.0)
    assert (router.view("e0").prompt_tokens, router.view("e0").num_digests) == (4 * PAGE + 8 + 1, 0)
    router.progress(0, 2, 2.0)
    assert router.view("e0").prompt_tokens == 0


def test_a_report_that_comes_after_a_death_changes_nothing() -> None:
    router = router_of(2)
    router.died("e0", 0.0)
    router.report("e0", report(), 0.1)
    assert router.view("e0").status == "dead"
    assert {send(router, request(number), 0.2) for number in range(20)} == {"e1"}
