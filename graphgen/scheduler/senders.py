"""Those who send requests to the engine, over a channel each: what they say, and which answer is whose.

Owns the channels. Knows no request: its id says whose it is (`graphgen.ipc.senders`). Made by
`graphgen.scheduler.process`, used on the thread of `graphgen.scheduler.loop`.
"""

from collections.abc import Iterator, Sequence

import zmq

from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Blamed, EngineToScheduler, Outputs, Rejected, SchedulerToEngine, TokenOutput
from graphgen.ipc.senders import sender_of

EngineChannel = Channel[SchedulerToEngine, EngineToScheduler]


class Senders:
    """All of them, by number from 0 on."""

    def __init__(self, channels: Sequence[EngineChannel]) -> None:
        self._channels = tuple(channels)

    def __len__(self) -> int:
        return len(self._channels)

    def register(self, poller: zmq.Poller) -> None:
        for channel in self._channels:
            poller.register(channel.receiver, zmq.POLLIN)

    def drain(self) -> Iterator[tuple[int, EngineToScheduler]]:
        """What has already arrived, and from whom, without waiting."""
        for sender, channel in enumerate(self._channels):
            for message in channel.drain():
                yield sender, message

    def owns(self, sender: int, request_id: int) -> bool:
        """Whether the id is one of the sender's."""
        return sender_of(request_id, len(self._channels)) == sender

    def send(self, sender: int, message: SchedulerToEngine) -> None:
        """To one of them."""
        self._channels[sender].send(message)

    def tell(self, message: SchedulerToEngine) -> None:
        """To all of them."""
        for channel in self._channels:
            channel.send(message)

    def answer(self, message: Outputs | Rejected | Blamed) -> None:
        """To those whose requests it is about."""
        count = len(self._channels)
        if count == 1:
            self._channels[0].send(message)
            return
        match message:
            case Rejected():
                self._channels[sender_of(message.request_id, count)].send(message)
            case Outputs():
                for sender, part in enumerate(outputs_of_each(message, count)):
                    if part:
                        self._channels[sender].send(part)
            case Blamed():
                for sender, blamed in enumerate(_blamed_of_each(message, count)):
                    if blamed.request_ids:
                        self._channels[sender].send(blamed)

    def close(self, linger_s: float) -> None:
        for channel in self._channels:
            channel.close(linger_s)


def outputs_of_each(outputs: Outputs, num_senders: int) -> list[Outputs]:
    """What each sender's requests get of a step, in the same order."""
    news: list[list[TokenOutput]] = [[] for _ in range(num_senders)]
    request_ids: list[list[int]] = [[] for _ in range(num_senders)]
    token_ids: list[list[int]] = [[] for _ in range(num_senders)]
    for output in outputs.outputs:
        news[output.request_id % num_senders].append(output)
    for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
        sender = request_id % num_senders
        request_ids[sender].append(request_id)
        token_ids[sender].append(token_id)
    return [
        Outputs(tuple(own), tuple(ids), tuple(tokens))
        for own, ids, tokens in zip(news, request_ids, token_ids, strict=True)
    ]


def _blamed_of_each(blamed: Blamed, num_senders: int) -> list[Blamed]:
    pairs = list(zip(blamed.request_ids, blamed.num_deaths, strict=True))
    parts = [[pair for pair in pairs if sender_of(pair[0], num_senders) == sender] for sender in range(num_senders)]
    return [Blamed(tuple(one for one, _ in part), tuple(deaths for _, deaths in part)) for part in parts]
