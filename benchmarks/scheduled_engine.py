"""An engine in virtual time with the real scheduler, for a few of them: see `benchmarks.simulated_replicas`."""

from collections.abc import Callable

import msgspec

from benchmarks.conversations import Turn
from benchmarks.modelled_engine import Heard
from benchmarks.virtual_engine import STEP_NOISE, VirtualDevice
from graphgen.base.page_digests import TOKEN_BYTES
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.scheduler.cost_model import CostModel
from graphgen.scheduler.policy import Scheduler


class ScheduledEngine:
    """As a ModelledEngine."""

    def __init__(self, make_scheduler: Callable[[], Scheduler], device: CostModel) -> None:
        """device: how long steps take."""
        self._make_scheduler = make_scheduler
        self._costs = device
        self._pace = 1.0
        self.epoch = 0
        self._num_unheard: dict[int, int] = {}  # of each request: tokens since it was heard of last
        self._begun: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._scheduler = self._make_scheduler()
        self._device = VirtualDevice(self._scheduler, self._costs, step_noise=STEP_NOISE, clock_ns=lambda: 0)
        self._device.pace = self._pace

    @property
    def pace(self) -> float:
        return self._pace

    @pace.setter
    def pace(self, pace: float) -> None:
        self._pace = self._device.pace = pace

    @property
    def next_s(self) -> float:
        return self._device.next_s

    def submit(self, request_id: int, turn: Turn, num_output: int, tenant: str, now_s: float) -> None:
        submit = Submit(
            request_id=request_id,
            prompt_token_ids=turn.tokens + bytes(TOKEN_BYTES * num_output),
            max_tokens=turn.output_len - num_output,
            min_tokens=0,
            stop_token_ids=(),
            sampler=SamplerParams(),
            arrived_s=now_s,
            tenant=tenant,
        )
        self._device.submit(submit, now_s)
        self._num_unheard[request_id] = 0

    def advance(self) -> list[Heard]:
        _, outputs = self._device.end_step()
        heard = []
        for request_id in outputs.request_ids:
            self._num_unheard[request_id] += 1
        for output in outputs.outputs:
            request_id, is_last = output.request_id, output.finish_reason is not None
            num_new = self._num_unheard[request_id] + 1
            is_first = request_id not in self._begun
            heard.append(Heard(request_id, num_new, output.cached_tokens if is_first else None, is_last))
            self._num_unheard[request_id] = 0
            self._begun.add(request_id)
            if is_last:
                self._begun.discard(request_id)
                del self._num_unheard[request_id]
        return heard

    def report(self) -> EngineReport:
        return msgspec.structs.replace(self._scheduler.report(), epoch=self.epoch)

    def end(self) -> dict[int, int]:
        emitted = {request_id: count for request_id, count in self._num_unheard.items() if count}
        self._num_unheard.clear()
        self._begun.clear()
        self.epoch += 1
        self._begin()
        return emitted
