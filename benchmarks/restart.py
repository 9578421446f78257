"""How long does a stream pause when the worker is killed? With and without a process that stands by.

    python -m benchmarks.restart --model benchmarks/shapes/llama-3.1-8b --load-format dummy --kills 5
    python -m benchmarks.restart --compile --kills 5

One stream decodes; its worker is killed (SIGKILL) as soon as a standby has imported everything; the pause is that
between two tokens of the stream. What the worker's start consisted of is printed as the engine tells it; the rest of a
pause is the end of the killed process and the computation of the stream's tokens. Memory is that of the process that
stands by: its own alone (nothing that the kernel could drop or that the worker shares with it), and its share of all.
"""

import logging
import os
import re
import signal
import time
from pathlib import Path

from benchmarks.options import add_engine_options, engine_settings, make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from benchmarks.settling import wait_for_standby
from graphgen import Engine, EngineConfig, SamplingParams

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


class Notices(logging.Handler):
    """What the engine says of its workers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "a new worker serves" in record.getMessage():
            self.lines.append(record.getMessage())


def memory_mib(pid: int, name: str) -> float:
    """A line of the kernel's account of a process's memory."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024.0


def pause_s(engine: Engine, num_tokens: int) -> float:
    """Kills the worker under a stream; the longest gap between two of its tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    gap_s = 0.0
    with engine.stream(PROMPT, sampling) as stream:
        next(stream)
        last_s = time.monotonic()
        os.kill(engine.pids["worker-0"], signal.SIGKILL)
        for _ in stream:
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - last_s), now_s
    return gap_s


def measure(config: EngineConfig, num_kills: int, num_tokens: int) -> tuple[Row, str, str]:
    """A row of the table, what the last new worker's start consisted of, and the device."""
    notices, pauses, own_mib, share_mib = Notices(), [], float("nan"), float("nan")
    logging.getLogger("graphgen").addHandler(notices)
    with Engine(config) as engine:
        for _ in range(num_kills):
            if config.standby:
                pid = wait_for_standby(engine)
                own_mib, share_mib = memory_mib(pid, "Private_Dirty"), memory_mib(pid, "Pss")
            pauses.append(pause_s(engine, num_tokens))
            # A step, so that starts are not limited.
            engine.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
        device = engine.info.worker.device
    logging.getLogger("graphgen").removeHandler(notices)
    row: Row = {
        "standby": "yes" if config.standby else "no",
        "pause median s": percentile(pauses, 50),
        "min s": min(pauses),
        "max s": max(pauses),
        "own memory MiB": own_mib,
        "share of memory MiB": share_mib,
    }
    return row, notices.lines[-1], device


def main() -> None:
    parser = make_parser(__doc__)
    add_engine_options(parser, without=("standby",))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="of the stream")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    rows, lines, device = [], [], ""
    for standby in (False, True):
        config = EngineConfig(**engine_settings(options, captures_all=False, standby=standby))
        row, line, device = measure(config, options.kills, options.tokens)
        rows.append(row)
        lines.append(f"standby {row['standby']}: {line}")
    about = machine(device)
    show(f"{options.kills} kills of the worker of {options.model or 'the demo model'}", rows, about)
    print("\n".join(lines))
    write_json(options.json, rows, about)


if __name__ == "__main__":
    run_script(main)
