"""The client of a Python program: an Engine that is elsewhere. Owns how a thread waits for whole outputs."""

import queue
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

from graphgen.api.engine import batch_of
from graphgen.ipc.ggp.messages import Health, Stats, Welcome
from graphgen.remote.address import ClientSettings
from graphgen.remote.core import RemoteCore
from graphgen.remote.requests import Chat, RemotePrompt
from graphgen.requests.open_request import Delivery, Sink
from graphgen.requests.outputs import RequestOutput
from graphgen.requests.sampling_params import SamplingParams
from graphgen.requests.streams import Stream


class Client:
    """Serves what the server at `address` serves; the default is what `graphgen serve` binds.

    Call it as you would an Engine. A server with CURVE keys wants its public key as `server_key`, and as `key_file`
    the secret key file that `graphgen keys new NAME` made. Use it in a `with`, or call close(). All methods may be
    called by several threads at once.

    Raises ConnectionLostError when the server does not answer within `connect_timeout_s` (10), and later, for requests
    that were open, when it is lost; what only the server can refuse is raised as an Engine raises it.
    """

    def __init__(self, address: str | None = None, /, **settings: Unpack[ClientSettings]) -> None:
        self._core = RemoteCore(address, settings)

    def generate(
        self,
        prompts: RemotePrompt | Sequence[RemotePrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The outputs of all prompts, in their order; a list also for a single prompt.

        prompts: text, a list of token ids, a Chat, or a list of these. The first that fails ends the call and all its
        requests; so does Ctrl-C.
        """
        batch: Sequence[RemotePrompt] = _batch_of(prompts)
        answers: queue.SimpleQueue[tuple[int, Delivery]] = queue.SimpleQueue()
        outputs: list[list[RequestOutput]] = [[] for _ in batch]
        request_ids = self._core.open(batch, sampling, False, [_sink(answers, number) for number in range(len(batch))])
        try:
            for _ in request_ids:
                number, delivery = answers.get()
                if isinstance(delivery, Exception):
                    raise delivery
                assert isinstance(delivery, RequestOutput), "a request that does not stream gets its outputs"
                outputs[number].append(delivery)
        except BaseException:
            self._core.cancel(request_ids)
            raise
        return [output for samples in outputs for output in samples]

    def stream(self, prompt: RemotePrompt, sampling: SamplingParams | None = None) -> Stream:
        """An iterator over the output of one prompt as it is made. The request is sent by this call.

        Leaving the iterator before its end (break, exception, close()) ends the request and frees its pages.
        """
        return Stream(self._core, prompt, sampling)

    def stats(self) -> Stats:
        """A snapshot of the server: sessions, requests, pages, steps."""
        return self._core.stats()

    def health(self) -> Health:
        """Whether the server takes requests and its worker answers; asks the worker."""
        return self._core.health()

    @property
    def info(self) -> Welcome:
        """What the server said of itself: model, limits, features."""
        return self._core.welcome

    def close(self) -> None:
        """Ends the session; open requests get EngineClosedError. Idempotent."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _batch_of(prompts: RemotePrompt | Sequence[RemotePrompt]) -> Sequence[RemotePrompt]:
    """A list of prompts, whether one was given or several."""
    if isinstance(prompts, Chat):
        return [prompts]
    if isinstance(prompts, Sequence) and not isinstance(prompts, str) and prompts and isinstance(prompts[0], Chat):
        return prompts  # type: ignore[return-value]  # the type of the first item decides
    return batch_of(prompts)  # type: ignore[arg-type]  # text and ids, as an Engine takes them


def _sink(answers: "queue.SimpleQueue[tuple[int, Delivery]]", number: int) -> Sink:
    return lambda delivery: answers.put((number, delivery))
