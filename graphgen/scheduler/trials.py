"""Which request ends worker groups, when it is one of them: suspects are tried one by one.

Owns the list of suspects and whose turn it is; never starts or ends a request. Called by `graphgen.scheduler.policy`.

A request that was in flight when a worker group died is a suspect, and so are its neighbours. After one death all go on
together: most deaths are no request's doing. After MAX_SHARED_DEATHS deaths without a new token in between, a suspect
runs alone until it gets a token, while all others wait. So the request that does it is found: it fails at its
MAX_DEATHS-th death, and nobody fails with it.
"""

from collections.abc import Sequence

from graphgen.scheduler.request import Request

MAX_SHARED_DEATHS = 2
"""Deaths since its newest token after which a request runs alone."""
MAX_DEATHS = 3
"""Deaths since its newest token after which a request fails."""


class Trials:
    """Suspects in the order of service, and the one that runs alone."""

    def __init__(self) -> None:
        self._suspects: list[Request] = []
        self._tried: Request | None = None
        self._tried_len = 0
        self.are_held = False
        """From the death that makes suspects until `next` has said that all are tried."""

    @property
    def tried(self) -> Request | None:
        """Who runs alone."""
        return self._tried

    def blame(self, requests: Sequence[Request]) -> list[Request]:
        """After a death: these were in the steps that died. Those that have to run alone for it are suspects from here
        on; a trial that was interrupted is held again. Returns those that fail of it."""
        for request in requests:
            request.count_death()
        self._tried = None
        found = {request.arrival: request for request in self._suspects if not request.ended}
        found |= {one.arrival: one for one in requests if one.num_deaths >= MAX_SHARED_DEATHS}
        self._suspects = sorted(found.values(), key=lambda request: request.rank, reverse=True)
        self.are_held = bool(self._suspects)
        return [request for request in requests if request.num_deaths >= MAX_DEATHS]

    def next(self) -> Request | None:
        """Whose turn it is; None when all are tried. Only when nobody runs and nothing is in flight."""
        while self._suspects:
            request = self._suspects.pop()
            if not request.ended:
                self._tried, self._tried_len = request, len(request.output)
                return request
        self.are_held = False
        return None

    def take_passed(self) -> Request | None:
        """The one that ran alone, once it has a new token or has ended; its trial is over then."""
        tried = self._tried
        if tried is None or not (tried.ended or len(tried.output) > self._tried_len):
            return None
        self._tried = None
        return tried
