"""`graphgen cluster up`: a cluster from its name to its end.

Owns the order in which its parts are made and ended, and what is checked before anything starts. The frontend and, if
it is started here, Ray are children of this process, the engines' actors belong to it: nothing outlives it.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from graphgen.base.signals import EndSignals
from graphgen.base.version import __version__
from graphgen.cluster.answering import Answering
from graphgen.cluster.frontend import FrontendChild, make_key
from graphgen.cluster.keeper import Keeper
from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.orders import EngineOrder
from graphgen.cluster.places import MachineResources, Needs, check_room, needs_of
from graphgen.cluster.ray_launcher import RayConnection, RayLauncher, check_answers, import_ray
from graphgen.cluster.record import SOCKET, ClusterStatus, Record
from graphgen.cluster.scaling import Scaling
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig
from graphgen.launch.replicas import OF_FRONTENDS
from graphgen.server.options import ServeOptions

LOOK_S = 0.5


def run_cluster(
    config: EngineConfig, options: ServeOptions, cluster: ClusterOptions, say: Callable[[str], None]
) -> int:
    """Until a signal or `graphgen cluster down`: the exit code.

    Raises ConfigError for what cannot work here, EngineDeadError where an engine or the frontend does not start.
    """
    import_ray(starts_here=cluster.address is None)
    check_config(config)
    if cluster.address is not None:
        check_answers(cluster.address)
    with contextlib.ExitStack() as stack:
        record = Record.claim(cluster.name)
        stack.callback(record.close)
        answering = Answering(record.folder / SOCKET, first_status(cluster))
        stack.callback(answering.close)
        connection = stack.enter_context(_connected(cluster, record.folder / "ray", answering, say))
        signals = EndSignals()  # after Ray, which has handlers of its own
        stack.callback(signals.ignore)
        config = for_machines(config, connection.machines())
        needs = needs_of(config)
        with answering.doing("waiting for machines with room"):
            _wait_for_room(connection, needs, cluster, lambda: signals.num_wishes + answering.num_asked_to_end > 0, say)
        keys = record.folder / "engine-keys"
        order = EngineOrder(0, __version__, config, None, make_key(keys), options.grace_s)
        launcher = RayLauncher(connection, cluster.name, order, needs)
        stack.callback(launcher.close)
        keeper = Keeper(
            cluster.name,
            Scaling(cluster.limits, cluster.engines),
            launcher,
            FrontendChild(for_frontend(config), options, keys),
            answering,
            connection.address,
            options.grace_s,
            config.start_timeout_s,
            say,
        )
        return keeper.run(signals)


@contextlib.contextmanager
def _connected(
    cluster: ClusterOptions, temporary: Path, answering: Answering, say: Callable[[str], None]
) -> Iterator[RayConnection]:
    """To a Ray that has no engine of this cluster. temporary: for the files of a Ray that is started here, and ends."""
    where = "starting Ray here" if cluster.address is None else f"joining Ray at {cluster.address}"
    say(where)
    try:
        with answering.doing(where):
            connection = RayConnection(cluster.address, temporary)
        try:
            connection.check_name(cluster.name)
            yield connection
        finally:
            with answering.doing("leaving Ray"):
                connection.close()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def first_status(cluster: ClusterOptions) -> ClusterStatus:
    """Of a cluster whose engines are still to be started."""
    return ClusterStatus(
        name=cluster.name,
        pid=os.getpid(),
        phase="starting",
        up_s=0.0,
        ray="",
        data="",
        control="",
        num_wanted=cluster.engines,
        least=cluster.limits.least,
        most=cluster.limits.most,
        num_held=0,
        engines=(),
    )


def check_config(config: EngineConfig) -> None:
    """Raises ConfigError for what an engine that Ray places cannot have."""
    if config.device.startswith("cuda:"):
        raise ConfigError(f"device is {config.device!r}, and Ray chooses the GPUs of an engine: use cuda")
    if config.replicas != 1:
        raise ConfigError(f"replicas is {config.replicas}, an engine of a cluster is one: use --engines")


def for_machines(config: EngineConfig, machines: list[MachineResources]) -> EngineConfig:
    """What every engine is told: the device that the machines have, a part of the cores of a CPU, no bars."""
    device = config.device
    if device == "auto":
        device = "cuda" if any(one.num_gpus for one in machines) else "cpu"
    threads = config.cpu_threads or (1 if device == "cpu" else None)
    return msgspec.structs.replace(config, device=device, cpu_threads=threads, progress=False)


def for_frontend(config: EngineConfig) -> EngineConfig:
    """What the frontend has to know of the engines' config. It computes nothing, so its machine needs no GPU."""
    return EngineConfig(**{name: getattr(config, name) for name in OF_FRONTENDS if name != "device"}, device="cpu")


def _wait_for_room(
    connection: RayConnection,
    needs: Needs,
    cluster: ClusterOptions,
    is_asked_to_end: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """For the engines of the start; where no machine can join, for as many as there may ever be. Without, when it is
    asked to end."""
    count = cluster.limits.most if connection.is_local else cluster.engines
    deadline_s = time.monotonic() + cluster.wait_s
    told = False
    while not is_asked_to_end():
        try:
            check_room(needs, count, connection.machines(), *connection.free())
            return
        except ConfigError as error:
            if time.monotonic() >= deadline_s:
                raise
            if not told:
                say(f"waiting for {cluster.wait_s:g} s: {error}")
            told = True
            time.sleep(LOOK_S)
