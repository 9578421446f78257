"""Which request ends worker groups, when it is one of them: suspects are tried one by one.

Owns the deaths that are held against requests, the list of suspects and whose turn it is; never starts or ends a
request. Called by `graphgen.scheduler.policy`.

A death is held against every request that had rows in the steps that died with the group. CLEARING_TOKENS new tokens
clear it: the first may come of tokens that are computed again, the second comes of a decode row, so rows of both kinds
have done no harm. The deaths of which it is not cleared are its deaths in a row.

    deaths in a row                           runs alone after    fails at
    without a new token in between                    2               4
    with at most one new token each time              3               5

Most deaths are no request's doing, so at first all go on together. A request that has to run alone does so, while all
others wait, until it is cleared or has ended. It fails only when two workers in a row died of it alone, and nobody
fails with it. One such death is no proof: whatever kills workers at short intervals strikes one that is tried, since
nobody else runs then, and often before its first token. The next group tries the same request first.

A death before the first step of a group is held against requests too. It cannot count against nobody: a request whose
prompt is fatal and that is served first ends every group in its first step.

A request that gets more tokens than that in each life is not found: each death costs a restart until it has its last.
"""

from collections.abc import Sequence

from graphgen.scheduler.request import Request

CLEARING_TOKENS = 2
"""New tokens that clear a request."""

MAX_SHARED_DEATHS, MAX_DEATHS = 3, 5
"""Deaths in a row after which a request runs alone, and after which it fails."""

MAX_SHARED_FRUITLESS, MAX_FRUITLESS = 2, 4
"""The same of deaths without a new token in between."""


class Trials:
    """Suspects in the order of service, and the one that runs alone."""

    def __init__(self) -> None:
        self._suspects: list[Request] = []
        self.tried: Request | None = None
        """Who runs alone."""
        self.are_held = False
        """From the death that makes suspects until `next` has said that all are tried."""

    def blame(self, requests: Sequence[Request]) -> list[Request]:
        """A worker group died with steps in flight in which these had rows. Suspects are tried from here on, the one
        whose trial was interrupted too. Returns those that fail of it."""
        for request in requests:
            _hold_against(request)
        interrupted = [] if self.tried is None else [self.tried]
        self.tried = None
        found = {one.arrival: one for one in (*self._suspects, *interrupted) if not one.ended}
        found |= {one.arrival: one for one in requests if _is_suspect(one)}
        self._suspects = sorted(found.values(), key=lambda request: request.rank, reverse=True)
        self.are_held = bool(self._suspects)
        return [one for one in requests if one.num_deaths >= MAX_DEATHS or one.num_fruitless_deaths >= MAX_FRUITLESS]

    def next(self) -> Request | None:
        """Whose turn it is; None when all are tried. Only when nobody runs and nothing is in flight."""
        while self._suspects:
            request = self._suspects.pop()
            if not request.ended:
                self.tried = request
                return request
        self.are_held = False
        return None

    def take_passed(self) -> Request | None:
        """The one that ran alone, once it is cleared or has ended; its trial is over then."""
        tried = self.tried
        if tried is None or not (tried.ended or _is_cleared(tried)):
            return None
        self.tried = None
        return tried


def _hold_against(request: Request) -> None:
    num_tokens = len(request.output)
    request.num_deaths = 1 if _is_cleared(request) else request.num_deaths + 1
    request.num_fruitless_deaths = 1 if num_tokens > request.death_len else request.num_fruitless_deaths + 1
    request.death_len = num_tokens


def _is_cleared(request: Request) -> bool:
    return len(request.output) >= request.death_len + CLEARING_TOKENS


def _is_suspect(request: Request) -> bool:
    return request.num_deaths >= MAX_SHARED_DEATHS or request.num_fruitless_deaths >= MAX_SHARED_FRUITLESS
