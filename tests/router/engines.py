"""Requests and reports for tests of the router."""

from graphgen.ipc.reports import EngineReport
from graphgen.router.policy import Router
from graphgen.router.records import Capacity, Choice, RoutedRequest

PAGE = 16
CAPACITY = Capacity(num_slots=8, num_pages=64, page_size=PAGE, token_budget=64)


def digests(*contents: int) -> tuple[bytes, ...]:
    """Of pages with these contents: equal beginnings give equal digests."""
    return tuple(repr(contents[: end + 1]).encode() for end in range(len(contents)))


def request(request_id: int, *contents: int, tail: int = 8, tenant: str = "", **fields: object) -> RoutedRequest:
    """Of one page for each content, and a tail that fills none. fields: of RoutedRequest."""
    asked: dict[str, object] = {"max_tokens": 10, "arrived_s": 0.0} | fields
    return RoutedRequest(
        request_id=request_id,
        tenant=tenant,
        digests=digests(*contents),
        prompt_len=len(contents) * PAGE + tail,
        **asked,  # type: ignore[arg-type]  # a test's own
    )


def report(
    num_open: int = 0,
    prompt_tokens: int = 0,
    output_tokens: int = 0,
    *,
    epoch: int = 0,
    num_steps: int = 0,
    num_tenants: int = 1,
    is_serving: bool = True,
    pace: float = 1.0,
    num_others: int | None = None,
) -> EngineReport:
    """pace: the engine takes so many times as long as others. num_others: of the open requests, with their part of the
    tokens; None: all are others'."""
    num_others = num_open if num_others is None else num_others
    share = num_others / num_open if num_open else 0.0
    return EngineReport(
        epoch=epoch,
        is_serving=is_serving,
        num_open=num_open,
        num_tenants=num_tenants,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_others=num_others,
        others_prompt_tokens=round(share * prompt_tokens),
        others_output_tokens=round(share * output_tokens),
        num_steps=num_steps,
        pages_free=0,
        prompt_token_s=1e-3 * pace,
        output_token_s=2e-3 * pace,
        step_s=5e-3 * pace,
    )


def router_of(count: int, seed: int = 0, capacity: Capacity = CAPACITY) -> Router:
    router = Router(seed=seed)
    for number in range(count):
        router.joined(f"e{number}", capacity, 0.0)
        router.report(f"e{number}", report(), 0.0)
    return router


def send(router: Router, asked: RoutedRequest, now_s: float = 0.0) -> str:
    """Where it went. It must not be refused."""
    choice = router.choose(asked, now_s)
    assert isinstance(choice, Choice), choice
    router.sent(choice)
    return choice.engine_id


def tell(router: Router, engine_id: str, said: EngineReport) -> None:
    """The engine says it for a while: what others sent counts by the last few reports."""
    for _ in range(40):
        router.report(engine_id, said, 0.0)
