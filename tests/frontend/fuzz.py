"""Mutated messages against a running server: `python -m tests.frontend.fuzz --messages 1000000`.

Every message is a valid one with bytes changed, cut, repeated or put in; every tenth connection sends bytes that are
not even ZeroMQ. A good client talks to the server all the while: it must get every token, and the server's memory must
stay.
"""

import argparse
import random
import socket
import time
from collections.abc import Iterator

from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import (
    Bye,
    Cancel,
    ChatMessage,
    ClientMessage,
    Delta,
    Done,
    Generate,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    Sampling,
    StatsRequest,
)
from graphgen.ipc.worker_messages import Probe
from graphgen.server.frontend.memory import ResidentMemory
from tests.fakes import STATS
from tests.frontend.harness import Frontend, RawClient, demo_tokenizer

SEEDS: list[ClientMessage] = [
    Hello(client="fuzz"),
    Generate(id=1, text="To be, or not to be", sampling=Sampling(stop=["a", "b"], seed=4, n=2)),
    Generate(id=2, prompt_ids=[1, 2, 1000], sampling=Sampling(top_p=0.5, deadline_ms=5.0)),
    Generate(id=3, prompt_u32=b"\x01\x00\x00\x00\x02\x00\x00\x00"),
    Generate(id=4, messages=[ChatMessage(role="user", content="é😀")]),
    Cancel(id=1, session="x"),
    Ping(t=2**53 - 1),
    StatsRequest(),
    HealthRequest(),
    Bye(),
]
LAST = 2**40 + 1
"""A number that no mutated ping has, for all practical purposes."""
GROUP = 200
"""Messages between two looks at the good client."""


def mutated(chance: random.Random) -> Iterator[list[bytes]]:
    """Messages without end, most of them not quite right."""
    framing = client_framing()
    while True:
        frames = [bytearray(frame) for frame in framing.encode(chance.choice(SEEDS))]
        for _ in range(chance.randint(0, 4)):
            frame = chance.choice(frames)
            mutate(frame, chance)
        if chance.random() < 0.02:
            frames = frames * chance.randint(0, 3) or [bytearray()]
        yield [bytes(frame) for frame in frames]


def mutate(frame: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(frame) + 1)
    match chance.randrange(5):
        case 0 if frame:
            frame[at % len(frame)] = chance.randrange(256)
        case 1:
            frame[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        case 2:
            del frame[at:]
        case 3:
            frame[at:at] = chance.choice([b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 5000, b"\xff"])
        case _:
            frame[at:at] = frame[: chance.randint(0, 20)]


def answer_engine(frontend: Frontend) -> None:
    """The fake scheduler ends each request that gets through with two tokens."""
    while (message := frontend.scheduler._channel.receive(0.0)) is not None:
        if isinstance(message, Submit):
            frontend.scheduler.send_tokens(message.request_id, [5, 6], "length")
        elif isinstance(message, Probe):
            frontend.scheduler.send(message)
        elif isinstance(message, SchedulerStatsRequest):
            frontend.scheduler.send(STATS)


def good_request(frontend: Frontend, client: RawClient, number: int) -> None:
    """Raises AssertionError when a request is not served as ever."""
    client.send(Generate(id=number, text="ROMEO:"))
    ids: list[int] = []
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        answer_engine(frontend)
        message = client.receive(0.005)
        if isinstance(message, Delta) and message.id == number:
            ids += message.ids
        if isinstance(message, Done) and message.id == number:
            break
    assert ids == [5, 6], f"request {number} got {ids}"


def wait_for_last_answer(frontend: Frontend, client: RawClient, on_control: bool) -> None:
    """Whatever came before has been handled then, since a connection's messages are handled in order."""
    if not on_control:
        client.send(Hello(client="last"))
    client.send(Ping(t=LAST))
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        answer_engine(frontend)
        match client.receive(0.005):
            case Pong(t=number) if number == LAST:
                return
    raise AssertionError("the server did not answer a good message after bad ones")


def garbage(frontend: Frontend, chance: random.Random) -> None:
    """A connection that does not speak ZeroMQ."""
    host, _, port = frontend.sockets.data.address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as raw:
        greeting = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03" if chance.random() < 0.5 else b""
        raw.sendall(greeting + bytes(chance.randrange(256) for _ in range(chance.randint(1, 400))))


def fuzz(frontend: Frontend, num_messages: int, seed: int) -> int:
    """Bytes by which the process grew after the first tenth. Raises AssertionError when a good request suffers."""
    chance = random.Random(seed)
    good = frontend.welcome()
    messages = mutated(chance)
    memory = ResidentMemory()
    settled_bytes = memory.num_bytes()
    for group in range(max(10, num_messages // GROUP)):
        if group % 10 == 0:
            garbage(frontend, chance)
        on_control = group % 4 == 0
        bad = frontend.welcome() if group % 2 else frontend.connect(control=on_control)
        for _ in range(num_messages // max(10, num_messages // GROUP)):
            bad.send_raw(*next(messages))
        good_request(frontend, good, group)
        wait_for_last_answer(frontend, bad, on_control)
        bad.close()
        if group == num_messages // GROUP // 10:
            settled_bytes = memory.num_bytes()
    return memory.num_bytes() - settled_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    frontend = Frontend(demo_tokenizer("{{ messages }}"))
    begun_s = time.monotonic()
    grown = fuzz(frontend, options.messages, options.seed)
    refused = frontend.server._monitor.messages_refused
    print(f"{options.messages} messages in {time.monotonic() - begun_s:.0f} s; {refused} refused at once;")
    print(f"memory grew by {grown / 2**20:.1f} MiB after the first tenth; every good request got its tokens")
    frontend.close()


if __name__ == "__main__":
    main()
