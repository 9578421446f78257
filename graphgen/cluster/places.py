"""What an engine needs of a machine, and whether the machines of a cluster have it.

Pure. Called before anything is started.
"""

from collections.abc import Sequence

from msgspec import Struct

from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig


class Needs(Struct, frozen=True):
    """Of one engine, all on one machine."""

    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        gpus = f"{self.num_gpus:g} GPU{'s' if self.num_gpus != 1 else ''} and " if self.num_gpus else ""
        return f"{gpus}{self.num_cpus:g} CPU{'s' if self.num_cpus != 1 else ''}"


class MachineResources(Struct, frozen=True):
    """What Ray says that a machine has."""

    name: str
    num_cpus: float
    num_gpus: float

    def num_engines(self, needs: Needs) -> int:
        """That it could hold if nothing else ran."""
        of_cpus = int(self.num_cpus // needs.num_cpus)
        return min(of_cpus, int(self.num_gpus // needs.num_gpus)) if needs.num_gpus else of_cpus


def needs_of(config: EngineConfig) -> Needs:
    """device is cpu or cuda. On CUDA a GPU for each rank and a core for the processes beside them; on the CPU the
    threads of each rank."""
    if config.device == "cpu":
        return Needs(float(config.tensor_parallel * (config.cpu_threads or 1)), 0.0)
    return Needs(1.0, float(config.tensor_parallel))


def check_room(
    needs: Needs, num_engines: int, machines: Sequence[MachineResources], free_cpus: float, free_gpus: float
) -> None:
    """Raises ConfigError where so many engines have no place."""
    fits = sum(machine.num_engines(needs) for machine in machines)
    fits = min(fits, int(free_cpus // needs.num_cpus))
    if needs.num_gpus:
        fits = min(fits, int(free_gpus // needs.num_gpus))
    if fits >= num_engines:
        return
    have = "; ".join(f"{one.name} has {one.num_gpus:g} GPUs and {one.num_cpus:g} CPUs" for one in machines)
    less = "" if fits else " or, where no machine is large enough, use less of it (--tensor-parallel, --cpu-threads)"
    raise ConfigError(
        f"{num_engines} engines were asked for, each needs {needs} on one machine, and there is room for {fits}:"
        f" {have}; {free_gpus:g} GPUs and {free_cpus:g} CPUs of them are free. Ask for fewer engines{less}, add"
        " machines with `ray start --address HOST:PORT`, or wait for them with --wait-s"
    )
