"""How requests were served, counted over the frontend's life: times, tokens, ends, and targets that were missed.

Pure: no clock, no socket. All gateways and all clients of the protocol share one frontend, so that what is counted here
is whole whichever gateway is asked for it, and stays when a gateway is started again. A token costs a subtraction, a
search among some twenty bounds and an addition. Called by `graphgen.server.frontend.desk`, read by
`graphgen.server.frontend.monitor`.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from graphgen.calls.outputs import StreamPiece
from graphgen.ipc.ggp.limits import MAX_ENDPOINTS
from graphgen.ipc.ggp.statistics import Histogram

ITL_BOUNDS_S = tuple(
    milliseconds / 1000
    for milliseconds in (
        *(0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25, 30, 40, 50, 75, 100, 150, 200),
        *(300, 500, 1000, 2500, 5000, 10000),
    )
)
TIME_BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5),
    *(10, 15, 20, 30, 40, 60, 80, 120, 160, 320, 640),
)
TOKEN_BOUNDS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Range:
    """Counts values by range: plain additions, without a lock."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def histogram(self) -> Histogram:
        return Histogram(bounds=list(self._bounds), counts=list(self._counts), sum=max(0.0, self._sum))


class RequestClock:
    """Of one request: when its samples got their tokens, and when they should have."""

    __slots__ = (
        "arrived_s",
        "first_s",
        "itl_target_s",
        "last_s",
        "num_tokens",
        "started_s",
        "tpot_target_s",
        "ttft_target_s",
    )

    def __init__(
        self,
        arrived_s: float,
        num_samples: int,
        ttft_target_ms: float | None = None,
        itl_target_ms: float | None = None,
        tpot_target_ms: float | None = None,
    ) -> None:
        self.arrived_s = arrived_s
        self.started_s = arrived_s  # when its first chunk was planned, once it has a token
        self.ttft_target_s = None if ttft_target_ms is None else ttft_target_ms / 1000
        self.itl_target_s = None if itl_target_ms is None else itl_target_ms / 1000
        self.tpot_target_s = None if tpot_target_ms is None else tpot_target_ms / 1000
        self.first_s = [0.0] * num_samples
        self.last_s = [0.0] * num_samples
        self.num_tokens = [0] * num_samples


class Tallies:
    """All of it."""

    def __init__(self) -> None:
        self.itl_s = Range(ITL_BOUNDS_S)
        self.tpot_s = Range(ITL_BOUNDS_S)
        self.ttft_s, self.queue_s, self.prefill_s, self.decode_s, self.inference_s, self.e2e_s = (
            Range(TIME_BOUNDS_S) for _ in range(6)
        )
        self.tokens_of_prompts, self.tokens_of_outputs = Range(TOKEN_BOUNDS), Range(TOKEN_BOUNDS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.ends: Counter[str] = Counter()
        self.with_target: Counter[str] = Counter(ttft=0, itl=0, tpot=0)
        self.target_misses: Counter[str] = Counter(ttft=0, itl=0, tpot=0)
        self.http_answers: Counter[str] = Counter()

    def took(self, clock: RequestClock, piece: StreamPiece, now_s: float, started_s: float) -> None:
        """A step gave a piece to a sample. started_s: when the request's first chunk was planned."""
        index, num_tokens = piece.sample_index, len(piece.token_ids)
        self.output_tokens += num_tokens
        if not clock.num_tokens[index]:
            clock.first_s[index] = now_s
            if not any(clock.num_tokens):
                self._begun(clock, piece, now_s, started_s)
        else:
            gap_s = now_s - clock.last_s[index]
            self.itl_s.add(gap_s)
            if clock.itl_target_s is not None:
                self._judge("itl", gap_s, clock.itl_target_s)
        clock.last_s[index] = now_s
        clock.num_tokens[index] += num_tokens

    def _begun(self, clock: RequestClock, piece: StreamPiece, now_s: float, started_s: float) -> None:
        """The first token of a request."""
        clock.started_s = max(started_s, clock.arrived_s)
        ttft_s = now_s - clock.arrived_s
        self.ttft_s.add(ttft_s)
        self.queue_s.add(clock.started_s - clock.arrived_s)
        self.prefill_s.add(max(0.0, now_s - clock.started_s))
        self.tokens_of_prompts.add(piece.prompt_tokens)
        self.prompt_tokens += piece.prompt_tokens
        self.cached_tokens += piece.cached_tokens
        if clock.ttft_target_s is not None:
            self._judge("ttft", ttft_s, clock.ttft_target_s)

    def ended(self, clock: RequestClock, finish: Sequence[str], has_failed: bool) -> None:
        """finish: of each sample, or the code of the error that ended the request."""
        self.ends.update(finish)
        for index, num_tokens in enumerate(clock.num_tokens):
            if num_tokens > 1:
                tpot_s = (clock.last_s[index] - clock.first_s[index]) / (num_tokens - 1)
                self.tpot_s.add(tpot_s)
                if clock.tpot_target_s is not None:
                    self._judge("tpot", tpot_s, clock.tpot_target_s)
        if has_failed or not any(clock.num_tokens):
            return
        last_s = max(clock.last_s)
        self.e2e_s.add(last_s - clock.arrived_s)
        self.decode_s.add(last_s - min(first_s for first_s in clock.first_s if first_s))
        self.inference_s.add(max(0.0, last_s - clock.started_s))
        self.tokens_of_outputs.add(sum(clock.num_tokens))

    def answered(self, http_answers: dict[str, int]) -> None:
        """What a gateway reports. Of more kinds of answers than there can be, the rest are one."""
        for name, count in http_answers.items():
            is_known = name in self.http_answers or len(self.http_answers) < MAX_ENDPOINTS
            self.http_answers[name if is_known else "other 0"] += count

    def _judge(self, kind: str, value_s: float, target_s: float) -> None:
        self.with_target[kind] += 1
        self.target_misses[kind] += value_s > target_s

    def histograms(self) -> dict[str, Histogram]:
        """By the names of `metrics.histograms`."""
        ranges = {
            "ttft_s": self.ttft_s,
            "itl_s": self.itl_s,
            "tpot_s": self.tpot_s,
            "queue_s": self.queue_s,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "inference_s": self.inference_s,
            "e2e_s": self.e2e_s,
            "prompt_tokens": self.tokens_of_prompts,
            "output_tokens": self.tokens_of_outputs,
        }
        return {name: counted.histogram() for name, counted in ranges.items()}
