"""What hostile and careless peers do to a server: see `main`.

Each kind runs in a process of its own, on the last core of the machine, against loopback only, and ends by itself after
its seconds. KEY is the server's public key where it has one, FILE the secret of a client that it lets in: hostile peers
may have keys, here all of them one. They come from addresses of 127.66/16, which no honest client uses.
"""

import contextlib
import itertools
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator

import zmq
import zmq.auth

from graphgen.ipc.ggp.framing import client_framing
from graphgen.ipc.ggp.messages import Cancel, ClientMessage, Generate, HealthRequest, Hello, Sampling, StatsRequest
from tests.frontend.raw_peers import GREETING, MORE, connect_raw, frame, shake_hands

MOST_SOCKETS = 700
"""Of one process at a time: the machine under test has other work."""
FRAMING = client_framing()


class Target:
    """The server under attack, and how long."""

    def __init__(self, data: str, control: str, seconds: float, server_key: str, key_file: str) -> None:
        self.data, self.control, self.server_key = data, control, server_key
        self._pair = zmq.auth.load_certificate(key_file) if key_file else zmq.curve_keypair()
        self._end_s = time.monotonic() + seconds
        self.chance = random.Random(os.getpid())
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 4096)

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._end_s

    def source(self) -> str:
        return f"127.66.0.{self.chance.randrange(1, 9)}"

    def dealer(self, address: str | None = None, stranger: bool = False, **options: int) -> "zmq.Socket[bytes]":
        """A client of ZeroMQ's; stranger: its key is none that the server knows."""
        dealer = self.context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.SNDTIMEO, 0)
        for name, value in options.items():
            dealer.set(getattr(zmq, name), value)
        if self.server_key:
            public, secret = zmq.curve_keypair() if stranger else self._pair
            dealer.curve_serverkey = self.server_key.encode()
            dealer.curve_publickey, dealer.curve_secretkey = public, secret
        dealer.connect((address or self.data).replace("//", f"//{self.source()}:0;"))
        return dealer

    def raw(self, timeout_s: float = 0.2) -> socket.socket | None:
        """None when it is not let in."""
        try:
            return connect_raw(self.data, self.source(), timeout_s)
        except OSError:
            return None


def send(dealer: "zmq.Socket[bytes]", message: ClientMessage) -> bool:
    """Whether there was room for it."""
    try:
        dealer.send_multipart(FRAMING.encode(message))
    except zmq.Again:
        return False
    return True


def endless(target: Target) -> None:
    """Messages without end, of frames small and large."""
    while target.goes_on:
        raw = target.raw()
        if raw is None:
            continue
        part = frame(bytes(target.chance.choice([0, 1, 1000, 100_000])), MORE)
        part *= max(1, (1 << 16) // len(part))
        with raw, contextlib.suppress(OSError):
            shake_hands(raw)
            while target.goes_on:
                raw.sendall(part)


def large(target: Target) -> None:
    """Sixty-four connections with valid messages as large as they come."""
    text = "a" * 65_000
    dealers = [target.dealer(SNDHWM=4) for _ in range(64)]
    for number in itertools.count():
        if not target.goes_on:
            return
        for dealer in dealers:
            send(dealer, Hello()) if number % 50 == 0 else send(dealer, Generate(id=number, text=text))
        time.sleep(0.005)


def descriptors(target: Target) -> None:
    """More connections than descriptors, kept, each with a session and a question."""
    kept = [target.dealer() for _ in range(MOST_SOCKETS)]
    while target.goes_on:
        for dealer in kept:
            send(dealer, Hello())
            send(dealer, StatsRequest())
        time.sleep(1.0)


def hellos(target: Target) -> None:
    """New sessions without a pause."""
    dealer = target.dealer()
    while target.goes_on:
        if not send(dealer, Hello(client="x" * 256)):
            time.sleep(0.001)
        with contextlib.suppress(zmq.Again):
            dealer.recv_multipart(zmq.NOBLOCK)


def handshakes(target: Target) -> None:
    """Connections that are made and left, some in the middle of the handshake; with keys whole ones by strangers."""
    while target.goes_on:
        if target.server_key and target.chance.random() < 0.5:
            dealer = target.dealer(stranger=True)
            time.sleep(0.02)
            dealer.close()
        raw = target.raw(0.05)
        if raw is not None:
            with raw, contextlib.suppress(OSError):
                raw.sendall(GREETING[: target.chance.randrange(1, 64)])


def greed(target: Target) -> None:
    """Priority 9, sixteen samples, as many as are taken, on several sessions; most are cancelled and asked again."""
    dealers = [target.dealer(SNDHWM=64) for _ in range(4)]
    for dealer in dealers:
        send(dealer, Hello())
    sampling = Sampling(n=16, priority=9, max_tokens=200, ignore_eos=True, deadline_ms=60_000.0)
    for number in itertools.count():
        if not target.goes_on:
            return
        for dealer in dealers:
            send(dealer, Generate(id=number, text="ROMEO:" * 20, sampling=sampling))
            if number % 3:
                send(dealer, Cancel(id=number - 1))
            with contextlib.suppress(zmq.Again):
                for _ in range(100):
                    dealer.recv_multipart(zmq.NOBLOCK)
        time.sleep(0.05)


def half_open(target: Target) -> None:
    """Connections that say nothing, or a byte now and then, or announce a frame that does not come."""
    kept: list[socket.socket] = []
    while target.goes_on:
        raw = target.raw(0.05) if len(kept) < MOST_SOCKETS else None
        if raw is not None:
            kept.append(raw)
            with contextlib.suppress(OSError):
                if len(kept) % 3 == 1:
                    shake_hands(raw)
                    raw.sendall(frame(bytes(150_000))[:9])  # announced and not sent
        for one in list(target.chance.sample(kept, min(10, len(kept)))):
            try:
                one.sendall(b"\xff")
            except OSError:
                kept.remove(one)
                one.close()
        time.sleep(0.01)


def slow(target: Target) -> None:
    """Asks for much and reads nothing."""
    dealers = [target.dealer(RCVHWM=1, RCVBUF=4096, SNDHWM=64) for _ in range(8)]
    for dealer in dealers:
        send(dealer, Hello())
    for number in itertools.count():
        if not target.goes_on:
            return
        for dealer in dealers:
            send(dealer, Generate(id=number, prompt_ids=[7] * 900, echo_ids=True, sampling=Sampling(max_tokens=1)))
            send(dealer, HealthRequest())
        time.sleep(0.01)


def control(target: Target) -> None:
    """Questions and garbage on the control socket."""
    dealers = [target.dealer(target.control) for _ in range(8)]
    for number in itertools.count():
        if not target.goes_on:
            return
        for dealer in dealers:
            send(dealer, (StatsRequest(), HealthRequest(), Cancel(id=number, session="x"), Hello())[number % 4])
            with contextlib.suppress(zmq.Again):
                dealer.send_multipart([b"GG\x01G", target.chance.randbytes(40_000)])
        time.sleep(0.01)


ATTACKS: dict[str, Callable[[Target], None]] = {
    attack.__name__: attack
    for attack in (endless, large, descriptors, hellos, handshakes, greed, half_open, slow, control)
}


def main(arguments: Iterator[str]) -> None:
    """`python -m tests.frontend.attacks KIND DATA CONTROL SECONDS [KEY FILE]`"""
    kind, data, control_address, seconds, server_key, key_file, *_ = [*arguments, "", ""]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ATTACKS[kind](Target(data, control_address, float(seconds), server_key, key_file))
    os._exit(0)  # without the goodbyes of so many sockets


if __name__ == "__main__":
    main(iter(sys.argv[1:]))
