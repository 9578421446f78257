"""The engine of a Python program: whole outputs and streams, from any thread.

Owns how a thread waits for tokens. Everything else is `graphgen.requests.core`.
"""

import functools
import queue
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.messages import EngineStats, Ready
from graphgen.launch.config import EngineConfig, EngineSettings, LaunchConfig, make_config
from graphgen.requests.core import EngineCore, Prompt
from graphgen.requests.open_request import Delivery
from graphgen.requests.outputs import RequestOutput
from graphgen.requests.sampling_params import SamplingParams
from graphgen.requests.streams import Stream


class Engine:
    """Serves one model in two processes of its own.

    `Engine()` serves the embedded demo model; `Engine("folder or hub id", ...)` and `Engine(EngineConfig(...))` any
    other. The constructor returns when the engine serves. Use it in a `with`, or call close(); a program that ends in
    any other way leaves no process behind either. All methods may be called by several threads at once.

    Raises ConfigError, UnsupportedModelError or CheckpointError for what cannot be served, EngineDeadError when a
    process ends during the start.
    """

    def __init__(self, model: str | EngineConfig | None = None, /, **settings: Unpack[EngineSettings]) -> None:
        self._core = EngineCore(make_config(model, settings))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The outputs of all prompts, in their order; a list also for a single prompt.

        prompts: text, a list of token ids, or a list of either. sampling: one for all, or one for each. With n > 1 the
        n outputs of a prompt follow one another, by sample_index.
        Raises InvalidRequestError before any is sent if one cannot be served; OverloadedError when one is refused,
        DeadlineError when one misses its deadline, and EngineDeadError or EngineClosedError if the engine ends
        meanwhile. An exception, Ctrl-C included, ends all requests of the call.
        """
        batch = batch_of(prompts)
        answers: queue.SimpleQueue[tuple[int, Delivery]] = queue.SimpleQueue()
        sinks = [functools.partial(_answer, answers, number) for number in range(len(batch))]
        request_ids = self._core.open(batch, sampling, streams=False, sinks=sinks)
        outputs: dict[tuple[int, int], RequestOutput] = {}
        try:
            while len(outputs) < len(request_ids):
                number, delivery = answers.get()
                if isinstance(delivery, Exception):
                    raise delivery
                assert isinstance(delivery, RequestOutput), "a request that does not stream gets its output"
                outputs[number, delivery.sample_index] = delivery
        except BaseException:
            self._core.cancel(request_ids)
            raise
        return [outputs[place] for place in sorted(outputs)]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Stream:
        """An iterator over the output of one prompt as it is made. The request is sent by this call.

        With n > 1 the pieces of its outputs come mixed, each with its sample_index. Raises as `generate` does.
        Leaving the iterator before its end (break, exception, close()) ends the request and frees its pages.
        """
        return Stream(self._core, prompt, sampling)

    def stats(self) -> EngineStats:
        """A snapshot of what runs and waits, of pages, steps and step times."""
        return self._core.stats()

    @property
    def info(self) -> Ready:
        """What the engine decided at its start: device, attention backend, buckets, pages, phases."""
        return self._core.ready

    @property
    def resolved(self) -> LaunchConfig:
        """The configuration with every choice made that the model or the device decides."""
        return self._core.launch

    @property
    def pids(self) -> dict[str, int]:
        """The engine's processes by name, for those who watch their CPU time or memory."""
        return dict(self._core.pids)

    @property
    def start_s(self) -> float:
        """Seconds from the constructor's call until the engine served."""
        return self._core.start_s

    @property
    def config(self) -> EngineConfig:
        """What was asked for."""
        return self._core.config

    def close(self) -> None:
        """Ends the engine's processes and frees the device. Open requests get EngineClosedError. Idempotent."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(answers: "queue.SimpleQueue[tuple[int, Delivery]]", number: int, delivery: Delivery) -> None:
    """The sink of prompt `number` of a call."""
    answers.put((number, delivery))


def batch_of(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts, whether one was given or several. What starts with a number is one prompt of token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequestError(
            f"prompts is of type {type(prompts).__name__}: give a str, a list of token ids, or a list of these"
        )
    if prompts and isinstance(prompts[0], (int, float)):
        return [prompts]  # type: ignore[list-item]  # the type of the first item decides
    return prompts  # type: ignore[return-value]  # as above
