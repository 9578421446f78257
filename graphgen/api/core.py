"""The engines of a Python program: their start, their end, and what happens when one of them ends.

Owns their processes and the links to them. With several, a thread watches them, starts those again that end, and lets
what is open go on at another. One EngineCore is one `Engine` or `AsyncEngine`.
"""

import logging
import threading
import time
import weakref
from functools import partial

from graphgen.base.progress import StartProgress
from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.errors import ConfigError, EngineClosedError, EngineDeadError
from graphgen.launch.config import EngineConfig
from graphgen.launch.engines import LOOK_S, Engines
from graphgen.launch.processes import EngineProcesses
from graphgen.launch.replicas import check_devices, of_replica
from graphgen.requests.core import AttachedCore, describe_start, launch_config, load_config_tokenizer
from graphgen.requests.tokenizer import write_tokenizer
from graphgen.router.engine_link import own_links
from graphgen.router.links import Links

logger = logging.getLogger("graphgen")

DRAIN_S = 30.0
"""What is open at an engine that drains may take so long there."""


class EngineCore(AttachedCore):
    """Running engines. The constructor returns when all of them serve, and leaves nothing behind when it raises."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        started_s = time.monotonic()
        check_devices(config)
        # The processes start first: they import torch while this one reads the model's config and tokenizer.
        engines = Engines(config.replicas, partial(EngineProcesses, num_ranks=config.tensor_parallel))
        with StartProgress(config.progress) as progress:
            try:
                links = Links(own_links([*engines], progress.show))
            except BaseException:
                engines.stop(grace_s=0.0)
                raise
            try:
                launch = launch_config(config)
                for number in range(len(engines)):
                    of_replica(launch, number, len(engines)).write(engines[number].folder)
                tokenizer = load_config_tokenizer(config, launch)
                for number in range(len(engines)):
                    write_tokenizer(tokenizer, engines[number].folder)
                remaining_s = config.start_timeout_s - (time.monotonic() - started_s)
                ready = links.wait_ready(max(0.0, remaining_s))
            except BaseException:
                links.close()
                raise
        super().__init__(launch, ready, tokenizer, links)
        self.start_s = time.monotonic() - started_s
        self._engines = engines
        self._links = links
        self.folder = engines[0].folder
        self._keeper = _Keeper(engines, links) if len(engines) > 1 else None
        # Runs when the last reference goes, and at the interpreter's exit.
        self._finalizer = weakref.finalize(self, _close, links, engines, self._keeper)
        logger.info("%s", describe_start(self.ready, self.start_s, with_phases=progress.shows_bars))

    @property
    def pids(self) -> dict[str, int]:
        """The engine's processes by name; a worker that was replaced has another pid. With replicas the names begin
        with `engine-NUMBER/`."""
        return self._engines.pids

    def drain(self, replica: int, grace_s: float = DRAIN_S) -> None:
        """See `Engine.drain`."""
        _check_seconds("grace_s", grace_s)
        self._kept(replica).drain(replica, grace_s)

    def resume(self, replica: int, timeout_s: float) -> None:
        """See `Engine.resume`."""
        _check_seconds("timeout_s", timeout_s)
        self._kept(replica).resume(replica, timeout_s)

    def _kept(self, replica: int) -> "_Keeper":
        if self._keeper is None:
            raise ConfigError("there is one engine, and nobody to take its requests: start with replicas above 1")
        if type(replica) is not int or not 0 <= replica < len(self._engines):
            raise ConfigError(f"replica is {replica!r}, they are 0 to {len(self._engines) - 1}")
        return self._keeper

    def __str__(self) -> str:
        """What runs where, for the repr of an engine."""
        launch, worker = self.launch, self.ready.worker
        times = f"{len(self._engines)} times, " if len(self._engines) > 1 else ""
        return (
            f"of {self.config.model or 'the demo model'} on {worker.device}, {times}{launch.dtype}, max_model_len"
            f" {launch.max_model_len}, {worker.num_pages} pages of {worker.page_size}"
        )

    def close(self) -> None:
        """Ends the processes and removes their folders. Idempotent, from any thread."""
        _close(self._links, self._engines, self._keeper)
        self._grammars.close()
        self._finalizer.detach()


class _Keeper:
    """The thread that watches several engines. Holds no reference to their core, which ends when nobody does."""

    def __init__(self, engines: Engines, links: Links) -> None:
        self._engines = engines
        self._links = links
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        links.when_ready(self._take_ready)
        self._thread = threading.Thread(target=self._run, name="graphgen-keeper", daemon=True)
        self._thread.start()

    def drain(self, number: int, grace_s: float) -> None:
        """Raises EngineClosedError when all of them are closed meanwhile, EngineDeadError as `Links.drain` does."""
        drained = threading.Event()
        self._check_open()
        self._links.drain(number, grace_s, lambda _: drained.set())
        while not drained.wait(LOOK_S):
            self._check_open()
        with self._changed:
            self._check_open()
            resting = self._engines.rest(number)
        resting.join()

    def resume(self, number: int, timeout_s: float) -> None:
        """Raises EngineClosedError when all of them are closed meanwhile, EngineDeadError when it takes too long."""
        with self._changed:
            self._check_open()
            self._links.expect(number)
            self._engines.wake(number)
            has_come = self._changed.wait_for(
                lambda: self._links.serves(number) or self._stopping.is_set(), min(timeout_s, threading.TIMEOUT_MAX)
            )
            self._check_open()
            if not has_come:
                raise EngineDeadError(
                    f"engine {number} does not serve after {timeout_s:g} s: see its log, or wait longer"
                )

    def _check_open(self) -> None:
        """Nothing is started, or waited for, behind `stop`."""
        if self._stopping.is_set():
            raise EngineClosedError("the engine was closed: make a new Engine")

    def stop(self) -> None:
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _take_ready(self, number: int, _: Ready) -> None:
        with self._changed:
            self._engines.serves(number)
            self._changed.notify_all()
        logger.warning("engine %d serves again", number)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self._look()
            except Exception:  # a watch that ends would leave dead engines unseen
                logger.exception("graphgen's watch over its engines failed; it goes on")

    def _look(self) -> None:
        for end in self._engines.look():
            reason = str(end.found)
            logger.warning("engine %d ended, %s: %s", end.number, _next(end.restarts), reason)
            self._links.lose(end.number, None if end.restarts else reason)
        self._links.tick()


def _check_seconds(name: str, seconds: float) -> None:
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (is_number and seconds >= 0):
        raise ConfigError(f"{name} is {seconds!r}: use seconds, 0 or more")


def _next(restarts: bool) -> str:
    return "and is started again" if restarts else "after too many starts that led to nothing, and is left for a while"


def _close(links: Links, engines: Engines, keeper: _Keeper | None) -> None:
    if not links.is_own:
        return  # in a fork of the program, whose engines are its parent's
    if keeper is not None:
        keeper.stop()
    links.close()
    engines.stop(grace_s=0.0)
