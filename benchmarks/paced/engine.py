"""An engine that computes nothing: every step it gives each of its requests a random token, at a set pace.

It stands in the scheduler's place, so that `benchmarks.protocol` and `benchmarks.frontends` measure the way of a token
and not its making. Run as a module it is that process:

    python -m benchmarks.paced.engine FOLDER PARENT_PID STEP_MS SENDERS
"""

import json
import random
import sys
import time
from pathlib import Path

import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import (
    Attach,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Outputs,
    Ready,
    ReportRequest,
    StatsRequest,
    Submit,
    TokenOutput,
)
from graphgen.ipc.reports import EngineReport
from graphgen.ipc.senders import engine_channel
from graphgen.ipc.worker_messages import Bucket, Probe, Shutdown, WorkerReady
from graphgen.launch.processes import end_with_parent
from graphgen.scheduler.senders import EngineChannel, Senders

VOCABULARY = 1024
"""Of the demo model, whose tokenizer makes the text."""
SENT_FILE = "sent.json"
"""Where the engine leaves, at its end, when it sent each token of each request, in the order of the requests."""

READY = Ready(WorkerReady("none", "none", False, False, (Bucket(256, 256),), 64, 1 << 20, 16, ()), 256, 256)


class PacedEngine:
    """The requests that get tokens, and when they got them."""

    def __init__(self, senders: Senders, step_ms: float) -> None:
        """step_ms: 0 is as fast as it can."""
        self._senders = senders
        self._poller = zmq.Poller()
        senders.register(self._poller)
        self._is_open = True
        self._num_steps = 0
        self._step_s = step_ms / 1000
        self._left: dict[int, int] = {}
        self._chance = random.Random(0)
        self._next_s = 0.0
        self.sent_s: dict[int, list[float]] = {}

    def run(self) -> None:
        """Until Shutdown."""
        while self._is_open:
            wait_s = max(0.0, self._next_s - time.monotonic()) if self._left else None
            self._poller.poll(None if wait_s is None else int(wait_s * 1000))
            for sender, message in self._senders.drain():
                self._take(sender, message)
            if self._left and time.monotonic() >= self._next_s:
                self._step()

    def _take(self, sender: int, message: EngineToScheduler) -> None:
        match message:
            case Submit():
                self._begin(message)
            case Cancel():
                self._left.pop(message.request_id, None)
            case Attach():
                self._senders.send(sender, READY)
            case StatsRequest():
                stats = EngineStats(len(self._left), 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0.0)
                self._senders.send(sender, stats)
            case ReportRequest():
                self._senders.send(sender, self._report(sender))
            case Probe():
                self._senders.send(sender, message)
            case Shutdown():
                self._is_open = False

    def _report(self, sender: int) -> EngineReport:
        """Of an engine that only decodes."""
        num_others = sum(not self._senders.owns(sender, request_id) for request_id in self._left)
        return EngineReport(
            epoch=0,
            is_serving=True,
            num_open=len(self._left),
            num_tenants=1,
            prompt_tokens=0,
            output_tokens=sum(self._left.values()),
            num_others=num_others,
            others_prompt_tokens=0,
            others_output_tokens=sum(self._left.values()) * num_others // max(1, len(self._left)),
            num_steps=self._num_steps,
            pages_free=0,
            prompt_token_s=27e-6,
            output_token_s=75e-6,
            step_s=5e-3,
        )

    def _begin(self, submit: Submit) -> None:
        if not self._left:
            self._next_s = time.monotonic()
        self._left[submit.request_id] = submit.max_tokens
        self.sent_s[submit.request_id] = []

    def _step(self) -> None:
        self._next_s += self._step_s
        self._num_steps += 1
        now_s = time.monotonic()
        news, request_ids, token_ids = [], [], []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            is_first, is_last = not self.sent_s[request_id], not self._left[request_id]
            token_id = self._chance.randrange(1, VOCABULARY)
            if is_first or is_last:
                news.append(TokenOutput(request_id, (token_id,), "length" if is_last else None, now_s))
            else:
                request_ids.append(request_id)
                token_ids.append(token_id)
            self.sent_s[request_id].append(now_s)
            if is_last:
                del self._left[request_id]
        self._senders.answer(Outputs(tuple(news), tuple(request_ids), tuple(token_ids)))


def main(folder: Path, parent_pid: int, step_ms: float, num_senders: int) -> None:
    end_with_parent(parent_pid, folder)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channels: list[EngineChannel] = [
        Channel(context, folder, engine_channel(sender), "lower", EngineToScheduler) for sender in range(num_senders)
    ]
    senders = Senders(channels)
    engine = PacedEngine(senders, step_ms)
    engine.run()
    partial = folder / f"{SENT_FILE}.partial"
    partial.write_text(json.dumps(list(engine.sent_s.values())))
    partial.rename(folder / SENT_FILE)
    senders.close(linger_s=1.0)
    context.term()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
