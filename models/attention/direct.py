"""FlashInfer's planned kernels called without its Python package, whose import takes seconds of a start.

A built library is a TVM FFI module: a loaded file has functions that can be called as they are. FlashInfer's Python
adds two things, the name of the file, which `PlannedLibrary` forms, and the arguments, which are here. Neither is
promised to stay, so a library that takes others is refused and left to FlashInfer. Never builds anything and never
imports FlashInfer. Called by libraries.py; planned.py calls the functions.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from graphgen.models.attention.kernels import PlannedLibrary, Scores
from graphgen.models.attention.variant import Scoring

Function = Callable[..., Any]  # a TVM FFI function checks its arguments itself

NUM_SHARED = 16
"""Leading arguments that `plan` takes in every library, and as many that `paged_run` takes."""

_ROPE_SCALE, _ROPE_BASE = 1.0, 1e4  # the kernels are built without rope, which the model applies
_TYPE_NAMES = {bool: "bool", int: "int"}


TypesOf = Callable[[str, Function], list[str]]
"""(name, function): the names of the types of all arguments that the function takes."""


class PlannedFunctions(Struct, frozen=True):
    """The two functions of a planned library, and what each takes behind the arguments that all libraries share."""

    plan: Function
    plan_tail: tuple[object, ...]
    paged_run: Function
    run_tail: Callable[[Scoring], tuple[object, ...]]


def asked_types(name: str, function: Function) -> list[str]:
    """A TypesOf that asks the function. Raises ValueError for one that takes nothing.

    A TVM FFI function that is called with too few arguments names the types of all, as in
    "`plan(0: DLTensor*, 1: int) -> Array<int>`. Expected 2 but got 0 arguments". The first such error of a process
    takes more than a second: its trace looks through the symbols of all that torch has loaded.
    """
    try:
        function()
    except TypeError as error:
        return re.findall(r"\b\d+: (\w+)", str(error))
    raise ValueError(f"its {name} takes no arguments")


def open_planned(library: PlannedLibrary, path: Path, types_of: TypesOf = asked_types) -> PlannedFunctions:
    """Loads the library from its file.

    Raises ImportError without TVM FFI, OSError or RuntimeError when the file cannot be linked, AttributeError or
    ValueError when its functions are not those that are called here.
    """
    import tvm_ffi

    return _of_module(library, tvm_ffi.load_module(str(path)), types_of)


def wrapped_functions(library: PlannedLibrary, loaded: Any) -> PlannedFunctions:
    """The same of what `library.load` returns: FlashInfer's Python around most libraries, whose `paged_run` takes
    one list of arguments for all of them.

    Raises ValueError when its `plan` takes what no known version takes.
    """
    if library.scores is Scores.SINKS:
        return _of_module(library, loaded, asked_types)
    plan_tail = _taken_plan_tail(library, asked_types("plan", loaded.plan))
    return PlannedFunctions(loaded.plan, plan_tail, loaded.paged_run, _wrapped_run_tail)


def _of_module(library: PlannedLibrary, module: Any, types_of: TypesOf) -> PlannedFunctions:
    plan_tail = _taken_plan_tail(library, types_of("plan", module.plan))
    types, run_tail = _run_tail(library)
    _taken("paged_run", types_of("paged_run", module.paged_run), (types,))
    return PlannedFunctions(module.plan, plan_tail, module.paged_run, run_tail)


def _wrapped_run_tail(scoring: Scoring) -> tuple[object, ...]:
    return (
        *(None,) * 2,  # mask, mask starts
        scoring.alibi_slopes,
        *(None,) * 3,  # prefix lengths, item positions, longest item
        scoring.numbers.softcap,
        scoring.numbers.scale,
        *(None,) * 3,  # scales of an fp8 Q, K and V
        _ROPE_SCALE,
        _ROPE_BASE,
        0,  # length of the item positions
        0,  # workspace size, for another backend
    )


def _taken_plan_tail(library: PlannedLibrary, takes: list[str]) -> tuple[object, ...]:
    tails = _plan_tails(library)
    return tails[_taken("plan", takes, [[_TYPE_NAMES[type(value)] for value in tail] for tail in tails])]


def _plan_tails(library: PlannedLibrary) -> tuple[tuple[object, ...], ...]:
    """Of each known version."""
    if library.backend == "fa3":
        return ((),)
    tail = (-1, False, 0)  # split size chosen freely, splitting on, nothing co-located
    of_0_7 = (*tail, 0)  # the rows of each chunk if all have as many; 0: they have not
    of_0_7_4 = (*of_0_7, False)  # whether all plans of a graph have as many
    return tail, of_0_7, of_0_7_4


_RunTail = tuple[Sequence[str], Callable[[Scoring], tuple[object, ...]]]
"""The types that `paged_run` takes behind the shared arguments, and their values."""


def _run_tail(library: PlannedLibrary) -> _RunTail:
    """In the order in which FlashInfer 0.6.13 passes them to the module: `paged_run` in its prefill.py."""
    if library.scores is Scores.SINKS:
        return ("ffi", "float"), lambda scoring: (scoring.sinks, scoring.numbers.scale)
    return _FA3_RUN_TAIL if library.backend == "fa3" else _FA2_RUN_TAIL


_FA3_RUN_TAIL: _RunTail = (
    (*("Optional",) * 4, *("float",) * 3, "int"),
    lambda scoring: (
        *(None,) * 4,  # prefix lengths, item positions, longest item, scales of V per head
        scoring.numbers.softcap,
        scoring.numbers.scale,
        1.0,  # scale of V
        0,  # length of the item positions
    ),
)
_FA2_RUN_TAIL: _RunTail = (
    (*("Optional",) * 8, *("float",) * 4, "int"),
    lambda scoring: (
        *(None,) * 2,  # mask, mask starts
        scoring.alibi_slopes,
        *(None,) * 3,  # prefix lengths, item positions, longest item
        *(None,) * 2,  # scale factors of a quantized K and V
        scoring.numbers.softcap,
        scoring.numbers.scale,
        1.0 / _ROPE_SCALE,
        1.0 / _ROPE_BASE,
        0,  # length of the item positions
    ),
)


def _taken(name: str, takes: list[str], tails: Sequence[Sequence[str]]) -> int:
    """Which of `tails` a function that takes these types has behind the shared arguments. Raises ValueError if none
    is."""
    known = [list(tail) for tail in tails]
    if len(takes) < NUM_SHARED or takes[NUM_SHARED:] not in known:
        expected = " or ".join(str(types) for types in known)
        raise ValueError(f"its {name} takes {takes}, not {NUM_SHARED} arguments and {expected}")
    return known.index(takes[NUM_SHARED:])
