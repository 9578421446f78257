"""One decision: of a few engines, the one where a request costs least; or why it goes nowhere.

Owns nothing but chance, and changes nothing. Called by `graphgen.router.policy`.
"""

from random import Random

from graphgen.router.fleet import Fleet
from graphgen.router.load import EngineLoad
from graphgen.router.open_request import OpenRequest
from graphgen.router.prefix_index import PrefixIndex
from graphgen.router.records import ALONE_AFTER, Choice, Refusal, RouterSettings

EXTRA_LOOKS = 8
"""More engines at random that are looked at before a request is refused: refusing must not cost much more than
choosing, or a flood of hopeless requests would hold up all others."""

_LEAST_RETRY_S, _MOST_RETRY_S = 0.1, 60.0

Candidates = dict[int, int]
"""Numbers of engines that are looked at, and how many pages of the prompt each is thought to keep."""


class Chooser:
    """Chooses among the engines of one fleet."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, index: PrefixIndex, random: Random) -> None:
        self._settings = settings
        self._fleet = fleet
        self._index = index
        self._random = random
        self._most_looks = settings.max_holders + settings.num_random

    def choose(self, opened: OpenRequest, output_share: float, now_s: float) -> Choice | Refusal:
        """output_share: of max_tokens, that outputs have on average."""
        fleet, request = self._fleet, opened.request
        among = fleet.eligible_mask
        for engine in opened.rejections:
            if fleet.by_number.get(engine.number) is engine:  # else it has left, and the number is another's
                among &= ~(1 << engine.number)
        if not among:
            return Refusal(
                request.request_id,
                "OverloadedError" if len(fleet) else "EngineDeadError",
                f"no engine takes requests now ({fleet.describe()}): retry later, or start another engine",
                1.0 if len(fleet) else None,
            )
        candidates = self._candidates(opened, among)
        num_outputs = opened.expected_outputs(output_share)
        is_alone = opened.num_losses >= ALONE_AFTER
        best: tuple[float, float] | None = None
        chosen, num_pages = fleet.eligible[0], 0
        for number, kept in candidates.items():
            engine = fleet.by_number[number]
            missing = opened.missing(kept * engine.capacity.page_size)
            cost_s = engine.cost_s(request, missing, num_outputs)
            # One that runs alone makes all others there wait. Among equals goes the one that keeps least.
            key = (
                float(engine.num_open + engine.num_others) if is_alone else cost_s,
                float(self._index.num_pages(number)),
            )
            if best is None or key < best:
                best, chosen, num_pages = key, engine, kept
        is_new = not opened.num_output and not opened.num_losses
        if is_new and (request.deadline_ms is not None or self._sheds(opened)):
            found = self._in_time(opened, chosen, candidates, num_outputs, among, now_s)
            if isinstance(found, Refusal):
                return found
            chosen = found
            num_pages = candidates[chosen.number]
        num_cached = num_pages * chosen.capacity.page_size
        first_token_s = chosen.first_token_s(request, opened.missing(num_cached))
        return Choice(request, chosen.engine_id, num_cached, first_token_s, opened.num_losses, is_alone)

    def _candidates(self, opened: OpenRequest, among: int) -> Candidates:
        """The engines that are looked at."""
        fleet, settings, random = self._fleet, self._settings, self._random
        digests = opened.request.digests
        eligible = fleet.eligible
        if len(eligible) <= self._most_looks:
            found = dict.fromkeys((engine.number for engine in eligible if among >> engine.number & 1), 0)
            found.update(self._index.holders(digests, among, len(eligible)) if digests else ())
            return found
        found = dict(self._index.holders(digests, among, settings.max_holders)) if digests else {}
        most_kept = max(found.values(), default=0)
        others = [eligible[random.randrange(len(eligible))] for _ in range(settings.num_random)]
        if fleet.warming and 2 * most_kept <= len(digests) and random.random() < settings.warm_up_share:
            others.append(fleet.warming[random.randrange(len(fleet.warming))])
        for engine in others:
            if among >> engine.number & 1:
                found.setdefault(engine.number, 0)
        if not found:  # those that are left turned nobody away, and chance missed them
            number = (among & -among).bit_length() - 1
            found[number] = 0
        return found

    # --- refusing ------------------------------------------------------------------------------------------------

    def _sheds(self, opened: OpenRequest) -> bool:
        return self._settings.shed_late_first_tokens and opened.request.ttft_target_ms is not None

    def _in_time(
        self,
        opened: OpenRequest,
        chosen: EngineLoad,
        candidates: Candidates,
        num_outputs: int,
        among: int,
        now_s: float,
    ) -> EngineLoad | Refusal:
        """The chosen engine if the request meets its deadline there; else another that is looked at where it does, or
        why there is none. Adds those that are looked at besides to the candidates."""
        late_s = self._late_s(opened, chosen, candidates[chosen.number], num_outputs, now_s)
        if late_s <= 0.0:
            return chosen
        eligible = self._fleet.eligible
        for _ in range(min(EXTRA_LOOKS, len(eligible))):
            engine = eligible[self._random.randrange(len(eligible))]
            if among >> engine.number & 1:
                candidates.setdefault(engine.number, 0)
        for number, kept in candidates.items():
            engine = self._fleet.by_number[number]
            own_s = self._late_s(opened, engine, kept, num_outputs, now_s)
            if own_s < late_s:
                chosen, late_s = engine, own_s
        if late_s <= 0.0:
            return chosen
        return self._refuse(opened, chosen, candidates, num_outputs, late_s, now_s)

    def _late_s(self, opened: OpenRequest, engine: EngineLoad, num_pages: int, num_outputs: int, now_s: float) -> float:
        """By how much it would miss what it asks for there; at most 0 if it would not, or if nobody can know."""
        request = opened.request
        if not engine.speeds.is_known:
            return 0.0
        missing = opened.missing(num_pages * engine.capacity.page_size)
        waited_s = now_s - request.arrived_s
        first_s = engine.first_token_s(request, missing)
        late_s = 0.0
        if request.deadline_ms is not None:
            last_s = first_s + (num_outputs - 1) * engine.speeds.step_s
            late_s = waited_s + last_s - request.deadline_ms / 1000.0
        if request.ttft_target_ms is not None and self._settings.shed_late_first_tokens:
            late_s = max(late_s, waited_s + first_s - request.ttft_target_ms / 1000.0)
        return late_s

    def _refuse(
        self,
        opened: OpenRequest,
        nearest: EngineLoad,
        candidates: Candidates,
        num_outputs: int,
        late_s: float,
        now_s: float,
    ) -> Refusal:
        request, speeds = opened.request, nearest.speeds
        missing = opened.missing(candidates[nearest.number] * nearest.capacity.page_size)
        alone_first_s = now_s - request.arrived_s + missing * speeds.prompt_token_s + speeds.step_s
        alone_last_s = alone_first_s + (num_outputs - 1) * speeds.step_s
        looked_at = f"{len(candidates)} of {len(self._fleet)} engines looked at"
        deadline_ms, target_ms = request.deadline_ms, request.ttft_target_ms
        if deadline_ms is not None and alone_last_s * 1000.0 > deadline_ms:
            return Refusal(
                request.request_id,
                "DeadlineError",
                f"the output takes about {alone_last_s * 1000.0:.0f} ms even if nothing else runs, deadline_ms is"
                f" {deadline_ms:g}: raise deadline_ms or lower max_tokens",
            )
        first_ms = 1000.0 * (now_s - request.arrived_s + nearest.first_token_s(request, missing))
        last_ms = first_ms + (num_outputs - 1) * speeds.step_s * 1000.0
        if deadline_ms is not None and last_ms > deadline_ms:
            message = (
                f"the output would be complete after about {last_ms:.0f} ms, deadline_ms is {deadline_ms:g}:"
                f" {looked_at} have no more room; retry later, raise deadline_ms or lower max_tokens"
            )
        else:
            message = (
                f"the first token would come after about {first_ms:.0f} ms, ttft_target_ms is {target_ms:g}:"
                f" {looked_at} have no more room; retry later or raise ttft_target_ms"
            )
        retry_s = min(max(late_s, _LEAST_RETRY_S), _MOST_RETRY_S)
        return Refusal(request.request_id, "OverloadedError", message, retry_s)
