"""What a trap does in the worker's process: it looks at the tokens of each plan before the step is launched.

Never imports torch: it is loaded before the worker's own first lines, which want to be the first to do that.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.traps import FOLDER_VARIABLE, NEXT_STEP, SPRUNG, write_at_once
from tests.traps.imports import when_imported

ON_DEVICE = ("illegal address", "spin")
RESULT_S = 0.1
"""Within this the result of a step is at the scheduler."""


def install() -> None:
    """Called in the first moment of a worker's process."""
    when_imported("graphgen.worker.runner", wrap_launch)


def wrap_launch(runner_module: Any) -> None:  # a module
    """Its ModelRunner springs traps from here on."""
    from graphgen.ipc.codec import unpack_int32

    folder = Path(os.environ[FOLDER_VARIABLE])
    launch = runner_module.ModelRunner.launch
    trapped: dict[int, int] = {}  # slots, and the token whose trap their decode rows spring

    def launch_or_not(self: Any, plan: Any, received_s: float) -> Any:  # as ModelRunner.launch
        harms = _take_for_step(folder)
        in_decodes = [trapped[slot] for slot in unpack_int32(plan.decode_slots) if slot in trapped]
        if in_decodes:
            time.sleep(RESULT_S)  # so that the token which the decode row computes has reached its request
        harms += [_take(folder, token_id) for token_id in in_decodes]
        token_ids, end = unpack_int32(plan.chunk_token_ids), 0
        for chunk in plan.chunks:
            if chunk.init is not None:  # the slot has a new owner
                trapped.pop(chunk.slot, None)
            start, end = end, end + chunk.length
            for token_id in token_ids[start:end]:
                rows = _rows(folder, token_id)
                if rows == "chunks":
                    harms.append(_take(folder, token_id))
                elif rows == "decodes":
                    trapped[chunk.slot] = token_id
        for harm in harms:
            _do(harm)
            if harm in ON_DEVICE:
                self._stream.submit(_kernel(harm))
        step = launch(self, plan, received_s)
        return _broken(step) if "raise later" in harms else step

    runner_module.ModelRunner.launch = launch_or_not


def _take_for_step(folder: Path) -> list[str]:
    """What a step does that is launched now, if a trap is set for it."""
    own = folder / f"{NEXT_STEP}.{os.getpid()}"
    try:
        (folder / NEXT_STEP).rename(own)  # of several ranks one takes it
    except FileNotFoundError:
        return []
    harm = own.read_text()
    own.unlink()
    write_at_once(folder / SPRUNG, repr(time.time()))
    print(f"a step springs its trap: {harm}", file=sys.stderr, flush=True)  # its last words, where it ends of it
    return [harm]


def _rows(folder: Path, token_id: int) -> str | None:
    """Which rows spring the trap of a token, if it has one."""
    path = folder / str(token_id)
    return path.read_text().split("\n")[0] if path.exists() else None


def _take(folder: Path, token_id: int) -> str:
    """What the token does."""
    path = folder / str(token_id)
    _, harm, how_often = path.read_text().split("\n")
    if how_often == "once":
        path.unlink()
    print(f"token {token_id} springs its trap: {harm}", file=sys.stderr, flush=True)
    return harm


def _do(harm: str) -> None:
    if harm == "exit":
        os._exit(3)
    if harm == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if harm == "raise":
        raise RuntimeError("a trap in launch")
    while harm == "hang":
        time.sleep(1.0)


def _kernel(harm: str) -> Callable[[], None]:
    from tests.traps import device

    return device.spin if harm == "spin" else device.write_far


def _broken(step: Any) -> Any:  # LaunchedStep
    import msgspec

    return msgspec.structs.replace(step, fetched=_BrokenMark())


class _BrokenMark:
    """A mark of the device's stream that is never reached."""

    def wait(self) -> float:
        raise RuntimeError("a trap in the collector")
