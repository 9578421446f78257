"""What arrives in a simulation: the workloads of `benchmarks.workload`, bursts, and chat beside long prompts.

Pure: the same text and seed make the same requests. Called by `benchmarks.simulate`.

    2600/60:16        as in `benchmarks.serving`, closed loop of 16 clients     2600/60@12.5   open loop
    bursts@RATE       chat at RATE a second, and 64 more requests at once every 10 s
    mix@RATE          chat, and one request in 50 is a document of 30 000 tokens; mix:CLIENTS in a closed loop

with xREQUESTS behind it. A chat request has 512 tokens of prompt and 160 of output on average, a document's output as
many; lengths are spread as in `benchmarks.workload`.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Self

import numpy as np
from msgspec import Struct

from benchmarks.virtual_engine import VirtualRequest
from benchmarks.workload import MIN_OUTPUT_LEN, MIN_PROMPT_LEN, SPREAD, RequestShape, Workload

CHAT_PROMPT_MEAN, CHAT_OUTPUT_MEAN = 512, 160
DOCUMENT_LEN = 30_000
DOCUMENT_EVERY = 50
BURST_SIZE = 64
BURST_EVERY_S = 10.0

_PATTERN = re.compile(r"(bursts|mix)(?::(\d+)|@(\d+(?:\.\d+)?))(?:x(\d+))?")
_DEFAULT_COUNT = 2000


class Scenario(Struct, frozen=True):
    """A kind of load that is no single distribution of lengths."""

    name: str
    num_requests: int
    clients: int | None  # None: an open loop
    rate: float | None  # of chat; None: a closed loop

    @classmethod
    def parse(cls, text: str, count: int | None) -> Self:
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no scenario: write mix@8, mix:32 or bursts@20, with xREQUESTS if you like")
        name, clients, rate, own_count = found.groups()
        number = int(own_count) if own_count else count if count is not None else _DEFAULT_COUNT
        if name == "bursts" and clients is not None:
            raise ValueError(f"{text!r} is a burst in a closed loop, where clients wait: give a rate, as bursts@20")
        if min(number, int(clients or 1), float(rate or 1.0)) <= 0:
            raise ValueError(f"{text!r}: all its numbers must be above 0")
        return cls(name, number, int(clients) if clients else None, float(rate) if rate else None)

    @property
    def label(self) -> str:
        return f"{self.name}:{self.clients}" if self.clients is not None else f"{self.name}@{self.rate:g}"

    def requests(self, seed: int, max_model_len: int) -> list[VirtualRequest]:
        """In the order of their arrival. Raises ValueError when a document does not fit the model's context."""
        random = np.random.default_rng(seed)
        prompts, outputs = (
            random.normal(mean, SPREAD * mean, self.num_requests).astype(int).clip(least).tolist()
            for mean, least in ((CHAT_PROMPT_MEAN, MIN_PROMPT_LEN), (CHAT_OUTPUT_MEAN, MIN_OUTPUT_LEN))
        )
        kinds = ["chat"] * self.num_requests
        arrivals = [0.0] * self.num_requests
        if self.rate is not None:
            gaps = random.exponential(1.0 / self.rate, self.num_requests)
            arrivals = list(accumulate(gaps.tolist()))
        if self.name == "mix":
            for index in range(DOCUMENT_EVERY // 2, self.num_requests, DOCUMENT_EVERY):
                kinds[index], prompts[index] = "document", DOCUMENT_LEN
        else:
            arrivals, kinds = _with_bursts(arrivals)
        if (longest := max(map(sum, zip(prompts, outputs, strict=True)))) > max_model_len:
            raise ValueError(
                f"{self.label} has a request of {longest} tokens, max_model_len is {max_model_len}: raise it"
            )
        shapes = map(RequestShape, arrivals, prompts, outputs)
        return list(map(VirtualRequest, shapes, kinds))


Load = Workload | Scenario


def parse_load(text: str, count: int | None) -> Load:
    """Raises ValueError for a text that is neither."""
    return Scenario.parse(text, count) if text[:1].isalpha() else Workload.parse(text, count)


def requests_of(load: Load, seed: int, max_model_len: int) -> list[VirtualRequest]:
    match load:
        case Workload():
            return [VirtualRequest(shape, "all") for shape in load.shapes(seed, max_model_len)]
        case Scenario():
            return load.requests(seed, max_model_len)


def _with_bursts(arrivals: Sequence[float]) -> tuple[list[float], list[str]]:
    """As many arrivals, some of which have moved into bursts; and which of the two each is."""
    num_bursts = 1
    while num_bursts * (BURST_SIZE + BURST_EVERY_S * len(arrivals) / arrivals[-1]) < len(arrivals):
        num_bursts += 1
    steady = arrivals[: max(0, len(arrivals) - num_bursts * BURST_SIZE)]
    bursts = [BURST_EVERY_S * (1 + index // BURST_SIZE) for index in range(len(arrivals) - len(steady))]
    merged = sorted([(at_s, "steady") for at_s in steady] + [(at_s, "burst") for at_s in bursts])
    return [at_s for at_s, _ in merged], [kind for _, kind in merged]
