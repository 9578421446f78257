"""An engine that computes nothing: every step it gives each of its requests a random token, at a set pace.

It stands in the scheduler's place, so that `benchmarks.protocol` measures the way of a token and not its making. Run as
a module it is that process:

    python -m benchmarks.paced_engine FOLDER PARENT_PID STEP_MS
"""

import json
import random
import sys
import time
from pathlib import Path

import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.messages import (
    Attach,
    Bucket,
    Cancel,
    EngineStats,
    EngineToScheduler,
    Outputs,
    Probe,
    Ready,
    SchedulerToEngine,
    Shutdown,
    StatsRequest,
    Submit,
    TokenOutput,
    WorkerReady,
)
from graphgen.ipc.senders import engine_channel
from graphgen.launch.processes import end_with_parent

VOCABULARY = 1024
"""Of the demo model, whose tokenizer makes the text."""
SENT_FILE = "sent.json"
"""Where the engine leaves, at its end, when it sent each token of each request, in the order of the requests."""

EngineChannel = Channel[SchedulerToEngine, EngineToScheduler]


class PacedEngine:
    """The requests that get tokens, and when they got them."""

    def __init__(self, channel: EngineChannel, step_ms: float) -> None:
        self._channel = channel
        self._step_s = step_ms / 1000
        self._left: dict[int, int] = {}
        self._chance = random.Random(0)
        self._next_s = 0.0
        self.sent_s: dict[int, list[float]] = {}

    def run(self) -> None:
        """Until Shutdown."""
        while True:
            wait_s = max(0.0, self._next_s - time.monotonic()) if self._left else None
            message = self._channel.receive(wait_s)
            match message:
                case Submit():
                    self._begin(message)
                case Cancel():
                    self._left.pop(message.request_id, None)
                case Attach():
                    worker = WorkerReady("none", "none", False, False, (Bucket(256, 256),), 64, 1 << 20, 16, ())
                    self._channel.send(Ready(worker, 256, 256))
                case StatsRequest():
                    self._channel.send(EngineStats(len(self._left), 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0.0))
                case Probe():
                    self._channel.send(message)
                case Shutdown():
                    return
            if self._left and time.monotonic() >= self._next_s:
                self._step()

    def _begin(self, submit: Submit) -> None:
        if not self._left:
            self._next_s = time.monotonic()
        self._left[submit.request_id] = submit.max_tokens
        self.sent_s[submit.request_id] = []

    def _step(self) -> None:
        self._next_s += self._step_s
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
        self._channel.send(Outputs(tuple(news), tuple(request_ids), tuple(token_ids)))


def main(folder: Path, parent_pid: int, step_ms: float) -> None:
    end_with_parent(parent_pid, folder)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel: EngineChannel = Channel(context, folder, engine_channel(), "lower", EngineToScheduler)
    engine = PacedEngine(channel, step_ms)
    engine.run()
    partial = folder / f"{SENT_FILE}.partial"
    partial.write_text(json.dumps(list(engine.sent_s.values())))
    partial.rename(folder / SENT_FILE)
    channel.close(linger_s=1.0)
    context.term()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
