"""What is sent to the engine and when: random prompts of normal lengths, or the lengths and times of a trace file.

Pure: the same seed makes the same requests. Called by `benchmarks.serving`, which sends them, and by
`benchmarks.simulate`, for which their shapes are enough.

Lengths follow DeepSpeed-FastGen's benchmark: normal with a standard deviation of 0.3 of the mean, prompts cut to
16..12000 tokens, outputs of 4 tokens or more. Token ids are uniform, so no prompt shares a prefix with another.
"""

import re
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Self

import msgspec
import numpy as np
from msgspec import Meta, Struct

SPREAD = 0.3
"""Standard deviation of the lengths, in means."""
MIN_PROMPT_LEN, MAX_PROMPT_LEN = 16, 12000
MIN_OUTPUT_LEN = 4

_PATTERN = re.compile(r"(\d+)/(\d+)(?::(\d+)|@(\d+(?:\.\d+)?))(?:x(\d+))?")


class RequestShape(Struct, frozen=True, forbid_unknown_fields=True):
    """All of a request that costs time. A trace file holds one per line, as a JSON object."""

    arrival_s: Annotated[float, Meta(ge=0)]  # since the start of the run; 0 in a closed loop: a free client decides
    prompt_len: Annotated[int, Meta(ge=1)]
    output_len: Annotated[int, Meta(ge=1)]


class PlannedRequest(Struct, frozen=True):
    """One request before it is sent."""

    arrival_s: float  # as in its shape
    prompt_token_ids: list[int]
    output_len: int


class Workload(Struct, frozen=True):
    """Random requests of these mean lengths: from `clients` in a closed loop, or at `rate` a second on average."""

    prompt_mean: int
    output_mean: int
    num_requests: int
    clients: int | None  # None: an open loop
    rate: float | None  # None: a closed loop
    copies: int = 1  # requests of equal lengths, one after the other

    def __post_init__(self) -> None:
        if (self.clients is None) == (self.rate is None):
            raise ValueError(
                f"clients is {self.clients} and rate is {self.rate}: a workload has one of them, clients for a closed"
                " loop or a rate for an open one"
            )
        numbers = (self.prompt_mean, self.output_mean, self.num_requests, self.clients or self.rate or 0)
        if min(numbers) <= 0:
            raise ValueError(f"workload {self.label} of {self.num_requests} requests: all its numbers must be above 0")
        if self.prompt_mean > MAX_PROMPT_LEN:
            raise ValueError(
                f"workload {self.label} has prompts of {self.prompt_mean} tokens: at most {MAX_PROMPT_LEN}"
            )
        if self.copies < 1 or self.num_requests % self.copies:
            raise ValueError(
                f"workload {self.label} of {self.num_requests} requests, {self.copies} of each: give a multiple"
            )

    @classmethod
    def of(cls, prompt_mean: int, output_mean: int, clients: int | None, rate: float | None, count: int | None) -> Self:
        """count: requests in all; None is 4 a client and 32 more, or 256 in an open loop."""
        chosen = count if count is not None else (4 * clients + 32 if clients is not None else 256)
        return cls(prompt_mean, output_mean, chosen, clients, rate)

    @classmethod
    def parse(cls, text: str, count: int | None) -> Self:
        """PROMPT/OUTPUT:CLIENTS or PROMPT/OUTPUT@RATE, either with xREQUESTS behind it: 2600/60:16, 256/256:256x768."""
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ValueError(
                f"workload {text!r} is not PROMPT/OUTPUT:CLIENTS or PROMPT/OUTPUT@RATE, with xREQUESTS if you like:"
                " write 2600/60:16 or 2600/60@12.5 or 256/256:256x768"
            )
        prompt_mean, output_mean, clients, rate, own_count = found.groups()
        return cls.of(
            int(prompt_mean),
            int(output_mean),
            int(clients) if clients else None,
            float(rate) if rate else None,
            int(own_count) if own_count else count,
        )

    def times(self, count: int) -> Self:
        """As many times the clients, or the rate, and each request as many times in its place, with ids of its own: N
        times the work to the token, by the same seed, which also ends as that of one does."""
        clients = None if self.clients is None else self.clients * count
        rate = None if self.rate is None else self.rate * count
        copies = self.copies * count
        return type(self)(self.prompt_mean, self.output_mean, self.num_requests * count, clients, rate, copies)

    @property
    def label(self) -> str:
        pace = f":{self.clients}" if self.clients is not None else f"@{self.rate:g}"
        return f"{self.prompt_mean}/{self.output_mean}{pace}"

    def shapes(self, seed: int, max_model_len: int) -> list[RequestShape]:
        """Those of `requests`. Prompts that do not fit the model's context with their output are cut."""
        return self._shapes(np.random.default_rng(seed), max_model_len)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> list[PlannedRequest]:
        """In the order of their arrival."""
        random = np.random.default_rng(seed)
        return _with_tokens(self._shapes(random, max_model_len), random, vocab_size)

    def _shapes(self, random: np.random.Generator, max_model_len: int) -> list[RequestShape]:
        arrivals = [0.0] * self.num_requests
        if self.rate is not None:
            arrivals = list(accumulate(random.exponential(1.0 / self.rate, self.num_requests).tolist()))
        num_drawn = self.num_requests // self.copies
        prompt_lens = _normal(random, self.prompt_mean, num_drawn).clip(MIN_PROMPT_LEN, MAX_PROMPT_LEN)
        output_lens = _normal(random, self.output_mean, num_drawn).clip(MIN_OUTPUT_LEN)
        room = max_model_len - int(output_lens.max())
        if room < MIN_PROMPT_LEN:
            raise ValueError(
                f"workload {self.label} has an output of {output_lens.max()} tokens, max_model_len is {max_model_len}:"
                f" lower the mean output or raise max_model_len; a prompt has at least {MIN_PROMPT_LEN} tokens"
            )
        prompt_lens = prompt_lens.clip(max=max_model_len - output_lens)
        lengths = (lens.repeat(self.copies).tolist() for lens in (prompt_lens, output_lens))
        return list(map(RequestShape, arrivals, *lengths))


class Trace(Struct, frozen=True):
    """Recorded arrivals and lengths; the token ids are random."""

    label: str
    lines: tuple[RequestShape, ...]
    clients: int | None = None  # never: a trace has its own times

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError with the number of a line that is no RequestShape."""
        lines = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                lines.append(msgspec.json.decode(line, type=RequestShape))
            except msgspec.MsgspecError as error:
                raise ValueError(
                    f'{path}:{number}: {error}: a line is {{"arrival_s": 0.5, "prompt_len": 900, "output_len": 60}}'
                ) from None
        if not lines:
            raise ValueError(f"{path} has no lines: give one JSON object per request")
        return cls(path.name, tuple(sorted(lines, key=lambda line: line.arrival_s)))

    def shapes(self, seed: int, max_model_len: int) -> list[RequestShape]:
        """As recorded; the seed changes nothing. Raises ValueError when one does not fit the model's context."""
        del seed
        longest = max(line.prompt_len + line.output_len for line in self.lines)
        if longest > max_model_len:
            raise ValueError(
                f"{self.label} has a request of {longest} tokens in all, max_model_len is {max_model_len}:"
                " raise it or shorten the trace"
            )
        return list(self.lines)

    def requests(self, seed: int, vocab_size: int, max_model_len: int) -> list[PlannedRequest]:
        """In the order of their arrival."""
        return _with_tokens(self.shapes(seed, max_model_len), np.random.default_rng(seed), vocab_size)


Load = Workload | Trace


def _normal(random: np.random.Generator, mean: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return random.normal(mean, SPREAD * mean, count).astype(np.int64)


def _with_tokens(shapes: Iterable[RequestShape], random: np.random.Generator, vocab_size: int) -> list[PlannedRequest]:
    return [
        PlannedRequest(shape.arrival_s, random.integers(vocab_size, size=shape.prompt_len).tolist(), shape.output_len)
        for shape in shapes
    ]
