"""Engines as actors of Ray: the only module that imports it, when it is used.

Owns the connection to Ray, each engine's actor and the placement group that keeps its place. Ray places, watches and
ends; it sees no token. Nothing is detached: when this process ends, however it ends, Ray ends the actors, and each
actor's server ends with its actor. Called by `graphgen.cluster.keeper`, on one thread.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from graphgen.base.version import how_to_install
from graphgen.cluster.engine_actor import EngineActor
from graphgen.cluster.orders import EngineOrder, EngineReport
from graphgen.cluster.places import MachineResources, Needs
from graphgen.cluster.roster import Address, Seen
from graphgen.ipc.errors import ConfigError, EngineDeadError
from graphgen.launch.processes import import_path

if TYPE_CHECKING:
    from types import ModuleType

NAMESPACE = "graphgen"
OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB. Nothing is put there."""
ANSWER_S = 30.0
"""An actor that says nothing for so long is lost: its machine may be."""
LEFT_S = 1.0
"""From the end of an actor until its server has noticed and is gone, with what it held of a device."""
CONNECT_S = 5.0
MOST_SAID = 1000
"""Characters of what Ray says of an actor."""


def import_ray(starts_here: bool = False) -> "ModuleType":
    """Raises ConfigError where it is not installed. starts_here: before Ray is started here, which listens on every
    address of the machine: a token keeps strangers out, unless the user has chosen otherwise. Ray reads it once."""
    if starts_here and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(f"graphgen cluster needs Ray ({error}): {how_to_install('ray')}") from None
    module: ModuleType = ray
    return module


class RayEngineActor(EngineActor):
    """As an actor of Ray, which knows the address of its machine."""

    def __init__(self, order: bytes) -> None:
        from ray.util import get_node_ip_address

        super().__init__(order, get_node_ip_address())


class _Life(Struct):
    """One actor."""

    actor: Any  # Ray has no type for the handle of an actor of a class that is not decorated
    group: Any
    report: Any  # the question that is under way
    asked_s: float
    seen: Seen
    has_answered: bool = False
    is_dead: bool = False  # its actor answers no more
    ending: Any = None  # the end that is under way
    end_s: float | None = None  # when its actor is killed, at the latest
    gone_s: float | None = None  # when nothing is left of it


class RayConnection:
    """To Ray, from the constructor to `close`."""

    def __init__(self, address: str | None, temporary: Path) -> None:
        """address: of a cluster of Ray that runs. None: one is started on this machine, with its files in `temporary`.

        Raises ConfigError where Ray is not installed or nothing answers at the address, EngineDeadError where it does
        not start.
        """
        self.ray = import_ray(starts_here=address is None)
        self.is_local = address is None
        """Whether Ray was started here, for this cluster alone."""
        if address is None:
            self._start_here(temporary)
        else:
            self._join(address)

    def _start_here(self, temporary: Path) -> None:
        os.environ["PYTHONPATH"] = import_path()  # for the actors
        try:
            self.ray.init(
                address="local",
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(temporary),
            )
        except Exception as error:  # Ray raises nothing narrower where one of its processes does not start in time
            raise EngineDeadError(
                f"Ray did not start on this machine ({error}). Its processes have 30 s to start: try again"
                " when the machine is less busy, or start it beforehand with `ray start --head` and give its --address"
            ) from None

    def _join(self, address: str) -> None:
        check_answers(address)
        try:
            self.ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except Exception as error:  # of several kinds, by what is missing
            raise ConfigError(
                f"the cluster of Ray at {address} cannot be joined ({error}): run the command on one of its machines,"
                f" or make this one of them with `ray start --address {address}`; if Ray wants a token, set"
                " RAY_AUTH_MODE=token here as well"
            ) from None

    @property
    def address(self) -> str:
        """Of its head."""
        return str(self.ray.get_runtime_context().gcs_address)

    def check_name(self, name: str) -> None:
        """Raises ConfigError where engines of such a cluster run."""
        from ray.util import list_named_actors

        own = f"{name}-engine-"
        taken = [one["name"] for one in list_named_actors(all_namespaces=True) if one["name"].startswith(own)]
        if taken:
            raise ConfigError(
                f"a cluster {name!r} is up already in this cluster of Ray ({', '.join(sorted(taken))}): end it with"
                " `graphgen cluster down` where it was started, or give this one another --name"
            )

    def machines(self) -> list[MachineResources]:
        """What every machine has."""
        return [
            MachineResources(
                str(node["NodeManagerHostname"]), node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def free(self) -> tuple[float, float]:
        """(CPUs, GPUs) that nothing uses, of all machines together."""
        free = self.ray.available_resources()
        return free.get("CPU", 0.0), free.get("GPU", 0.0)

    def close(self) -> None:
        """Ends Ray where it was started here. Idempotent."""
        if self.ray.is_initialized():
            self.ray.shutdown()


def check_answers(address: str) -> None:
    """Raises ConfigError for what is no address of Ray, and where nothing listens."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ConfigError(f"{address!r} is no address of Ray: give HOST:PORT, as `ray start --head` says it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no number, or a name that is none
        raise ConfigError(
            f"nothing answers at {address} ({error}): start Ray there with `ray start --head --port {port}`, or leave"
            " --address out to start it on this machine"
        ) from None


class RayLauncher:
    """Engines of one cluster. Has the calls of a Launcher."""

    def __init__(self, connection: RayConnection, name: str, order: EngineOrder, needs: Needs) -> None:
        """order: what every engine is told, with its number and host. needs: what it needs of its machine."""
        self._ray = connection.ray
        self._is_local = connection.is_local
        self._name = name
        self._order = order
        self._needs = needs
        self._lives: dict[int, _Life] = {}
        self._num_lives = 0

    def start(self, number: int) -> None:
        """Where Ray finds a place, in a group of its own: STRICT_PACK, since ranks share a machine."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert number not in self._lives, "it has a life"
        self._num_lives += 1
        needs = self._needs
        bundle = {"CPU": needs.num_cpus} | ({"GPU": needs.num_gpus} if needs.num_gpus else {})
        group = placement_group([bundle], strategy="STRICT_PACK")
        order = msgspec.structs.replace(self._order, number=number, host="127.0.0.1" if self._is_local else None)
        actor_class = self._ray.remote(RayEngineActor).options(
            name=f"{self._name}-engine-{number}.{self._num_lives}",
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_gpus,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        actor = actor_class.remote(order.encode())
        self._lives[number] = _Life(actor, group, actor.report.remote(), time.monotonic(), Seen("placing"))

    def end(self, number: int, grace_s: float) -> None:
        """An actor that has never answered, or is lost, is killed: it may wait for a place."""
        life = self._lives.get(number)
        if life is None or life.end_s is not None:
            return
        life.end_s = time.monotonic()
        if life.has_answered and not life.is_dead:  # else there is nobody to clean up
            life.end_s += grace_s + ANSWER_S
            life.ending = life.actor.end.remote(grace_s)
        life.seen = Seen("ending", life.seen.node, life.seen.address)

    def look(self) -> Mapping[int, Seen]:
        """Takes what the actors have answered, asks them again, and buries those that have ended."""
        now_s = time.monotonic()
        questions = [life.report if life.ending is None else life.ending for life in self._lives.values()]
        answered = set(self._ray.wait(questions, num_returns=len(questions), timeout=0)[0]) if questions else set()
        for number, life in list(self._lives.items()):
            if life.end_s is not None:
                if self._bury(life, life.ending in answered, now_s):
                    del self._lives[number]
            elif life.report in answered:
                self._take_report(life, now_s)
            elif life.has_answered and now_s - life.asked_s > ANSWER_S:
                life.is_dead = True
                life.seen = Seen("lost", life.seen.node, reason=f"its actor did not answer for {ANSWER_S:g} s")
            elif life.seen.state == "placing" and life.group.wait(0):
                life.seen = Seen("starting")
        return {number: life.seen for number, life in self._lives.items()}

    def _take_report(self, life: _Life, now_s: float) -> None:
        if life.seen.state == "lost":
            return
        try:
            report = EngineReport.decode(self._ray.get(life.report))
        except self._ray.exceptions.RayError as error:
            life.is_dead = True
            life.seen = Seen("lost", life.seen.node, reason=_reason(error))
            return
        life.has_answered = True
        if report.state == "ended":
            life.seen = Seen("lost", report.node, reason=report.problem)
            return
        address = None
        if report.state == "serving":
            address = Address(report.data, report.control, report.server_key, report.num_slots)
        life.seen = Seen(report.state, report.node, address, pids=report.pids)
        life.report = life.actor.report.remote()
        life.asked_s = now_s

    def _bury(self, life: _Life, has_ended: bool, now_s: float) -> bool:
        """Whether nothing is left of it."""
        if life.gone_s is None:
            if not has_ended and life.end_s is not None and now_s < life.end_s:
                return False
            self._kill(life)
            # Its server ended in order, or ends as soon as it finds that its actor is gone.
            life.gone_s = now_s + (0.0 if has_ended else LEFT_S)
        return now_s >= life.gone_s

    def _kill(self, life: _Life) -> None:
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(life.actor)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            remove_placement_group(life.group)

    def close(self) -> None:
        """Ends all actors at once. Idempotent."""
        for life in self._lives.values():
            self._kill(life)
        self._lives.clear()


def _reason(error: Exception) -> str:
    """What Ray says of an actor that died, without the frames of its own code and its advice."""
    cause = getattr(error, "cause", None)
    text = " ".join(str(error if cause is None else cause).split()).partition(" Some common causes include")[0]
    return text[:MOST_SAID] or type(error).__name__
