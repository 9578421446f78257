"""The step log: one JSON line a step, what it held and when it was where. Opened by `graphgen.scheduler.process` where
the configuration names a file, written by `graphgen.scheduler.loop`.

    {"step": 17, "bucket": [112, 16], "chunks": [[request, start, length], ...], "decodes": [request, ...],
     "padding": 3, "planned_s": ..., "received_s": ..., "launched_s": ..., "started_s": ..., "finished_s": ...}

Times are time.monotonic() of the machine: planned by the scheduler, received and launched by the worker, started and
finished on the device.
"""

from types import TracebackType
from typing import BinaryIO

import msgspec

from graphgen.ipc.worker_messages import StepResult
from graphgen.scheduler.plan import StepDescription


class StepLog:
    """An open log, or none."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file

    @classmethod
    def open(cls, path: str | None) -> "StepLog":
        """A fresh log at `path`; None keeps no log."""
        return cls(open(path, "wb") if path is not None else None)  # closed by __exit__

    @property
    def is_open(self) -> bool:
        """Whether anything is kept: without a log, a step need not be described."""
        return self._file is not None

    def write(self, step: StepDescription, result: StepResult) -> None:
        if self._file is None:
            return
        line = {
            "step": step.step_id,
            "bucket": [step.bucket.prefill_rows, step.bucket.decode_rows],
            "chunks": step.chunks,
            "decodes": step.decode_request_ids,
            "padding": step.padding_rows,
            "planned_s": step.planned_s,
            "received_s": result.received_s,
            "launched_s": result.launched_s,
            "started_s": result.started_s,
            "finished_s": result.finished_s,
        }
        self._file.write(msgspec.json.encode(line) + b"\n")

    def flush(self) -> None:
        """Makes what was written visible to readers."""
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
