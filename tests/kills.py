"""`kill -9` of clients, at every phase of their requests: `python -m tests.kills --times 1000`.

A client is killed before its hello is answered, with prompts waiting, while prompts are computed, while it reads, or
right at the end. After each its pages must be free within three seconds, and at the end nothing may be left.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from graphgen import Client
from tests import ROOT
from tests.serving import ServerProcess, serving

GONE_WITHIN_S = 3.0
VICTIM = """
import sys, time
from graphgen import Client, SamplingParams
print("starting", flush=True)
client = Client(sys.argv[1])
print("connected", flush=True)
streams = [client.stream([5] * 300, SamplingParams(max_tokens=int(sys.argv[2]), ignore_eos=True)) for _ in range(8)]
print("open", flush=True)
next(streams[0])
print("reading", flush=True)
for stream in streams:
    for piece in stream:
        pass
print("done", flush=True)
time.sleep(60)
"""
PHASES = ("starting", "connected", "open", "reading", "done")


def kill_a_client(server: ServerProcess, chance: random.Random) -> str:
    """Starts a client and kills it in a phase, which is returned."""
    phase = chance.choice(PHASES)
    max_tokens = "20" if phase == "done" else "600"
    command = [sys.executable, "-c", VICTIM, server.address, max_tokens]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as victim:
        assert victim.stdout is not None
        while victim.stdout.readline().decode().strip() != phase:
            assert victim.poll() is None, "the client ended by itself"
        time.sleep(chance.choice([0.0, 0.001, 0.01, 0.1, 0.3]))
        victim.kill()
    return phase


def becomes_idle(client: Client, timeout_s: float = GONE_WITHIN_S) -> bool:
    """Whether every page is free, and nothing runs or waits, within the time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        stats = client.stats()
        if stats.pages_free == stats.pages_total and stats.running == stats.waiting == stats.open_requests == 0:
            return True
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    phases = dict.fromkeys(PHASES, 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder)) as server,
        Client(server.address) as client,
    ):
        for number in range(options.times):
            phase = kill_a_client(server, chance)
            phases[phase] += 1
            assert becomes_idle(client), f"kill {number}, while {phase}: {client.stats()}"
        stats = client.stats()
        print(f"{phases}: all pages free within {GONE_WITHIN_S:g} s each time; at the end {stats}")


if __name__ == "__main__":
    main()
