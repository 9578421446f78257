"""`graphgen cluster up`: a cluster from its name to its end.

Owns the order in which its parts are made and ended, and what is checked before anything starts. The frontend and, if
it is started here, Ray are children of this process, the engines' actors belong to it: nothing outlives it.
"""

import contextlib
import shutil
import time
from collections.abc import Callable

import msgspec

from graphgen.base.signals import EndSignals
from graphgen.base.version import __version__
from graphgen.cluster.frontend import FrontendChild, make_key
from graphgen.cluster.keeper import Keeper
from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.orders import EngineOrder
from graphgen.cluster.places import MachineResources, Needs, check_room, needs_of
from graphgen.cluster.ray_launcher import RayConnection, RayLauncher, check_answers, import_ray
from graphgen.cluster.record import Record
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
        say(f"{'starting Ray here' if cluster.address is None else f'joining Ray at {cluster.address}'}")
        temporary = record.folder / "ray"
        connection = RayConnection(cluster.address, temporary)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.callback(connection.close)
        connection.check_name(cluster.name)
        signals = EndSignals()  # after Ray, which has handlers of its own
        stack.callback(signals.ignore)
        config = for_machines(config, connection.machines())
        needs = needs_of(config)
        _wait_for_room(connection, needs, cluster, say)
        keys = record.folder / "engine-keys"
        order = EngineOrder(0, __version__, config, None, make_key(keys), options.grace_s)
        launcher = RayLauncher(connection, cluster.name, order, needs)
        stack.callback(launcher.close)
        keeper = Keeper(
            cluster.name,
            Scaling(cluster.limits, cluster.engines),
            launcher,
            FrontendChild(for_frontend(config), options, keys),
            record,
            connection.address,
            options.grace_s,
            config.start_timeout_s,
            say,
        )
        return keeper.run(signals)


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
    connection: RayConnection, needs: Needs, cluster: ClusterOptions, say: Callable[[str], None]
) -> None:
    """For the engines of the start; where no machine can join, for as many as there may ever be."""
    count = cluster.limits.most if connection.is_local else cluster.engines
    deadline_s = time.monotonic() + cluster.wait_s
    told = False
    while True:
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
