"""Ends the worker of an engine on a GPU under many streams, in the ways that only a device has, and times the pause.

    python -m tests.device_deaths --model benchmarks/shapes/llama-3.1-8b --load-format dummy
    python -m tests.device_deaths --kinds kill "illegal address" spin --times 2

STREAMS requests decode. Then the worker is killed, or a step of it launches a kernel that writes to an illegal address
or one that never ends. Every stream must end with as many tokens as it asked for, and none may be sent an error. Prints
for each death: until it was seen, until the next worker served, and until every stream had its next token; and what the
engine says the new worker's start consisted of, which names the wait for the dead one's memory.
"""

import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.options import add_engine_options, engine_settings, make_parser
from benchmarks.report import Row, machine, show
from graphgen import Engine, EngineConfig, SamplingParams
from tests.traps import Traps
from tests.worker_deaths import LossNotices, Reader, all_have_more, check_idle, wait_for

STREAMS = 64
KINDS = ("kill", "illegal address", "spin")
PROMPT_TOKENS = 200
OUTPUT_TOKENS = 600
LAST_WORDS = 400
ENOUGH_TOKENS = 50
"""Of every stream before the death."""


class Starts(LossNotices):
    """What the engine says of the worker that replaced another, too."""

    def __init__(self) -> None:
        super().__init__()
        self.last_start = ""

    def emit(self, record) -> None:  # type: ignore[no-untyped-def]  # as its parent's
        super().emit(record)
        if "a new worker serves" in record.getMessage():
            self.last_start = record.getMessage()


def last_words(engine: Engine) -> str:
    """What the scheduler's log says of the worker that was lost last."""
    log = (engine._core.folder / "scheduler.log").read_text()
    return log.rpartition("Its last words:")[2].partition("it computed")[0].strip()[-LAST_WORDS:]


def strike(engine: Engine, traps: Traps, kind: str) -> float:
    """When it struck, as time.time()."""
    if kind == "kill":
        os.kill(engine.pids["worker-0"], signal.SIGKILL)
        return time.time()
    traps.set_for_next_step("spin" if kind == "spin" else "illegal address")
    wait_for(lambda: traps.sprung_s is not None, "a step that springs the trap")
    assert traps.sprung_s is not None
    return traps.sprung_s


def one_death(engine: Engine, traps: Traps, notices: Starts, kind: str) -> Row:
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    prompts = [[(7 * stream + place) % 1000 + 1 for place in range(PROMPT_TOKENS)] for stream in range(STREAMS)]
    readers = [Reader(engine, prompt, sampling) for prompt in prompts]
    wait_for(lambda: all(len(reader.token_ids) >= ENOUGH_TOKENS for reader in readers), "tokens of every stream")
    struck_s = strike(engine, traps, kind)
    wait_for(lambda: notices.first_after(struck_s) is not None, "a word of the loss")
    seen = notices.first_after(struck_s)
    assert seen is not None
    before = {reader: list(reader.token_ids) for reader in readers}
    counts = {reader: len(token_ids) for reader, token_ids in before.items()}
    wait_for(lambda: notices.served_s > struck_s, "a worker that serves")
    wait_for(lambda: all_have_more(counts, readers), "the next token of every stream")
    resumed_s = time.time()
    for reader in readers:
        reader.thread.join()
        assert reader.error is None, f"a stream ended with {reader.error!r}"
        assert len(reader.token_ids) == OUTPUT_TOKENS, len(reader.token_ids)
        assert reader.token_ids[: len(before[reader])] == before[reader]
    check_idle(engine.stats())
    return {
        "death": kind,
        "seen ms": (seen[0] - struck_s) * 1000.0,
        "served s": notices.served_s - struck_s,
        "all streams s": resumed_s - struck_s,
        "said": seen[1],
    }


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=1)
    options = parser.parse_args()
    rows, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        traps = Traps(Path(folder))
        config = EngineConfig(**engine_settings(options))
        with Starts() as notices, traps.in_environment(), Engine(config) as engine:
            for kind in options.kinds * options.times:
                rows.append(one_death(engine, traps, notices, kind))
                starts.append(f"{kind}: {notices.last_start}; its last words: {last_words(engine)}")
            device, start_s = engine.info.worker.device, engine.start_s
    show(f"{STREAMS} streams; the first start took {start_s:.1f} s", rows, machine(device))
    print("\n".join(starts))


if __name__ == "__main__":
    main()
