"""The frontend process: puts the server together, and takes it apart when it has drained.

It is a client of the scheduler, in the place where an Engine would be, and it knows neither torch nor the worker. It
may die at any time, for instance of its memory limit: the supervisor starts another, which takes its place.
"""

import contextlib
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import zmq

from graphgen.base.addresses import unbound
from graphgen.base.descriptors import raise_descriptor_limit
from graphgen.base.garbage import leave_imports_alone
from graphgen.base.inbox import Inbox
from graphgen.base.logs import log_to_stderr
from graphgen.base.memory import limit_memory
from graphgen.base.version import __version__
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Notice, Ready
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.framing import server_framing
from graphgen.ipc.ggp.messages import MAJOR, ServerLimits, Welcome
from graphgen.ipc.server_messages import Drain, Drained, Listening, SupervisorToFrontend
from graphgen.ipc.worker_messages import Failed
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.processes import Exit, end_with_parent
from graphgen.requests.core import AttachedCore
from graphgen.requests.tokenizer import read_tokenizer
from graphgen.router.engine_link import own_links
from graphgen.router.links import Links
from graphgen.server.frontend.authentication import Access, Authenticator, Everyone
from graphgen.server.frontend.desk import Desk
from graphgen.server.frontend.elsewhere import Elsewhere
from graphgen.server.frontend.gate import Gate
from graphgen.server.frontend.keys import Keys
from graphgen.server.frontend.memory import connection_limits, keep_heap_small
from graphgen.server.frontend.monitor import Monitor
from graphgen.server.frontend.outbox import Outbox
from graphgen.server.frontend.prepare import Preparer
from graphgen.server.frontend.reception import Reception
from graphgen.server.frontend.server import PublicSockets, Server, SupervisorChannel
from graphgen.server.frontend.sessions import Sessions, session_limits
from graphgen.server.frontend.settings import (
    CONTROL_FRAME_BYTES,
    FrontendSettings,
    frame_bytes_limit,
    frontend_name,
    settings_file,
    text_bytes_limit,
)
from graphgen.server.frontend.sockets import Context, PublicSocket
from graphgen.server.frontend.told import Told

logger = logging.getLogger("graphgen.server.frontend")

LINGER_S = 1.0
LOOK_S = 0.1
"""How often a frontend that waits for its engines looks whether it is to end."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from the loop: a prompt is checked while others' tokens arrive."""


class EngineElsewhere:
    """Stands for the processes of an engine, which the supervisor watches."""

    def __init__(self, folder: Path, sender: int = 0) -> None:
        self.folder = folder
        self.sender = sender
        self.pids: dict[str, int] = {}

    def find_exit(self) -> Exit | None:
        return None

    def log_tail(self, name: str, num_lines: int = 0) -> str:
        return ""

    def stop(self, grace_s: float) -> None:
        pass


class ToldToEndError(Exception):
    """By the supervisor, before any engine served."""


def main(folder: Path, parent_pid: int, number: int) -> None:
    """Runs until it has drained, or until the supervisor ends. number: among the frontends of the server."""
    end_with_parent(parent_pid, folder)
    raise_descriptor_limit()
    keep_heap_small()
    name = frontend_name(number)
    log_to_stderr(name, drops_repeats=True)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    inner: Context = zmq.Context()
    supervisor: SupervisorChannel = Channel(inner, folder, name, "lower", SupervisorToFrontend)
    try:
        supervisor.send(Drained(_serve(folder, number, supervisor)))
        code = 0
    except ToldToEndError:  # it never served, so nothing was open
        supervisor.send(Drained(0))
        code = 0
    except BaseException as error:
        logger.exception("the frontend failed")
        supervisor.send(Failed("frontend", type(error).__name__, str(error) or repr(error)))
        code = 1
    supervisor.close(linger_s=LINGER_S)
    inner.term()
    sys.exit(code)


def _serve(folder: Path, number: int, supervisor: SupervisorChannel) -> int:
    """How many requests were lost when it drained."""
    settings = FrontendSettings.read(settings_file(folder, number))
    launch = LaunchConfig.read(folder)
    public: Context = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(public.term)
        keys = None if settings.keys is None else Keys(Path(settings.keys))
        access: Access = Everyone()
        if keys is not None:
            access = authenticator = Authenticator(public, keys)
            stack.callback(authenticator.stop)
        inbox = Inbox()
        stack.callback(inbox.close)
        orders: list[SupervisorToFrontend] = []
        elsewhere = None
        if settings.elsewhere is not None:  # their context decides what this one serves
            elsewhere = Elsewhere(settings, launch, read_tokenizer(folder), supervisor.send, inbox.wake)
            links = elsewhere.links
            stack.callback(links.close)
            ready = await_engines(elsewhere.wait_ready, supervisor, orders)
            launch = elsewhere.settle()
        gate = make_gate(public, settings, launch)
        stack.callback(gate.close)
        sockets = bind(public, gate, settings, launch, keys)
        for socket in sockets:
            stack.callback(socket.close, LINGER_S)
        if elsewhere is None:
            folders = [Path(name) for name in settings.engines] or [folder]
            engines = [EngineElsewhere(one, number) for one in folders]
            makers = own_links(engines, supervisor.send, attaches=True, after_outputs=inbox.wake)
            links = Links(makers, supervisor.send, seed=number)
            stack.callback(links.close)
            least = len(links) if settings.awaits_all else 1
            wait = partial(links.wait_ready, threading.TIMEOUT_MAX, least)  # the supervisor has an eye on the time
            ready = await_engines(wait, supervisor, orders)
        supervisor.send(ready)
        sender = number, settings.num_frontends, time.monotonic()
        core = AttachedCore(launch, ready, read_tokenizer(folder), links, *sender)
        server = make_server(sockets, supervisor, inbox, links, core, settings, access, elsewhere)
        stack.callback(server.close)
        limit_memory(settings.memory_limit_bytes)
        gate.limit_memory()
        leave_imports_alone()
        supervisor.send(Listening(sockets.data.address, sockets.control.address))
        return server.run(orders)


def await_engines(
    wait: Callable[[], Ready], supervisor: SupervisorChannel, orders: list[SupervisorToFrontend]
) -> Ready:
    """What `wait` returns, which may take for ever. orders: gets what the supervisor says meanwhile. Raises
    ToldToEndError where the server is to end, else what `wait` raises."""
    found: Future[Ready] = Future()

    def fulfil() -> None:
        try:
            found.set_result(wait())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=fulfil, name="graphgen-await-engines", daemon=True).start()
    while not futures.wait([found], LOOK_S).done:
        orders += supervisor.drain()
        if any(isinstance(order, Drain) for order in orders):
            raise ToldToEndError
    return found.result()


def _tell_ready(inbox: Inbox, links: Links, core: AttachedCore, server: Server, number: int, ready: Ready) -> None:
    """An engine serves in the place of one that ended. On the link's thread."""

    def take() -> None:
        core.ready = links.ready if links.num_serving else ready
        server.engine_serves(number)

    inbox.put(take)
    inbox.wake()


def _tell_away(inbox: Inbox, server: Server, number: int, reason: str, is_refused: bool) -> None:
    """An engine elsewhere has ended, or cannot be reached. On the link's thread."""
    inbox.put(partial(server.engine_is_away, number, reason, is_refused))
    inbox.wake()


def _pass_notice_on(inbox: Inbox, supervisor: SupervisorChannel, server: Server, notice: Notice) -> None:
    """To the operator, and to clients. On the link's thread."""
    supervisor.send(notice)
    inbox.put(partial(server.notify, notice.text))
    inbox.wake()


def make_server(
    sockets: PublicSockets,
    supervisor: SupervisorChannel,
    inbox: Inbox,
    links: Links,
    core: AttachedCore,
    settings: FrontendSettings,
    access: Access,
    elsewhere: Elsewhere | None = None,
) -> Server:
    """The server of these sockets and engines. access: what keys may do. elsewhere: the engines, if they are."""
    framing = server_framing()
    sessions, outbox = (
        Sessions(session_limits(settings.max_sessions, sockets.data.most_connections)),
        Outbox(sockets.data, framing),
    )
    preparer = Preparer(core, framing, settings.threads, access.max_priority)
    desk = Desk(links, preparer, inbox, outbox, settings, supervisor.send)
    monitor = Monitor(links, inbox, sessions, desk, outbox)
    welcome = _welcome(settings, core, sockets)
    reception = Reception(sockets.data, framing, sessions, desk, outbox, settings, welcome, access, Told(links))
    server = Server(
        sockets, supervisor, framing, inbox, sessions, desk, outbox, monitor, reception, welcome.instance, elsewhere
    )
    links.when_away(partial(_tell_away, inbox, server))
    links.when_ready(partial(_tell_ready, inbox, links, core, server))
    if elsewhere is not None:
        elsewhere.tell_serving()
    links.when_noticed(partial(_pass_notice_on, inbox, supervisor, server))
    return server


def make_gate(context: Context, settings: FrontendSettings, launch: LaunchConfig) -> Gate:
    """For as many connections as the memory limit has room for. Raises ConfigError if that is next to none."""
    frame_bytes = frame_bytes_limit(launch.max_model_len)
    limits = connection_limits(settings.memory_limit_bytes, frame_bytes, launch.max_model_len)
    logger.info("at most %d connections, %d of one address", limits.connections, limits.per_address)
    return Gate(context, limits)


def bind(
    context: Context, gate: Gate, settings: FrontendSettings, launch: LaunchConfig, keys: Keys | None
) -> PublicSockets:
    """Both sockets; from here on clients may connect, and wait."""
    server_key = None if keys is None else keys.server_secret_key()
    sockets = (
        ("data", settings.data, frame_bytes_limit(launch.max_model_len), settings.private),
        ("control", settings.control, CONTROL_FRAME_BYTES, None),
    )
    bound: list[PublicSocket] = []
    try:
        for name, address, frame_bytes, private in sockets:
            dead_peer_s = settings.slow_consumer_s
            bound.append(PublicSocket(context, gate, name, address, frame_bytes, dead_peer_s, server_key, private))
    except (ConfigError, zmq.ZMQError) as error:
        for socket in bound:
            socket.close(0.0)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(unbound(address, error)) from None
    gate.start()
    return PublicSockets(*bound)


def _welcome(settings: FrontendSettings, core: AttachedCore, sockets: PublicSockets) -> Welcome:
    launch = core.launch
    features = {
        "text": core.has_tokenizer,
        "chat": core.has_tokenizer and core.tokenizer.has_chat,
        "samples": True,
        "classes": True,
        "mean_gaps": True,
        "prefix_cache": launch.prefix_cache,
        "model_defaults": True,
        "notices": True,
        "batches": True,
        "log_ids": True,
        "logprobs": True,
        "logit_bias": True,
        "prompt_only": core.has_tokenizer,
        "structured": core.serves_structured,
        "structured_opening": core.serves_structured,
        "elsewhere": settings.elsewhere is not None,
        "marks": core.has_tokenizer,
        "template_arguments": core.has_tokenizer and core.tokenizer.has_chat,
    }
    return Welcome(
        version=MAJOR,
        session="",
        instance=secrets.token_hex(8),
        server=f"graphgen/{__version__}",
        model=settings.model,
        vocab_size=launch.spec.vocab_size,
        eos_token_ids=list(core.eos_token_ids),
        features=[name for name, has in features.items() if has],
        limits=ServerLimits(
            frame_bytes=frame_bytes_limit(launch.max_model_len),
            prompt_tokens=launch.max_model_len,
            text_bytes=text_bytes_limit(launch.max_model_len),
            open_requests=settings.open_requests,
            open_prompt_tokens=settings.open_prompt_tokens,
        ),
        heartbeat_ms=round(settings.heartbeat_s * 1000),
        slow_consumer_ms=round(settings.slow_consumer_s * 1000),
        control=sockets.control.address,
        sampling_defaults=launch.sampling_defaults,
        frontends=list(settings.frontends),
    )
