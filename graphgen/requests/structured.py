"""From what a request says of its output's structure to a grammar for the worker, tried before anything is computed.

Owns the child process that makes and tries grammars (`graphgen.requests.grammar_builder`), how long it may take for
one, and the grammars that were found to be good. Called by `graphgen.requests.core` on any thread.
"""

import contextlib
import importlib.util
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache

import msgspec

from graphgen.calls.structured import JsonSchema, Structured
from graphgen.ipc.errors import InvalidRequestError
from graphgen.launch.processes import import_path

COMPILE_S = 2.0
"""A grammar that takes longer is refused."""
START_S = 20.0
"""For the child to come up, on a busy machine."""
KEPT = 64
"""Grammars."""

_BUILDER = "graphgen.requests.grammar_builder"


class GrammarMaker:
    """Of one engine. Its child lives from the first grammar to the end of the engine, or of this process."""

    def __init__(self) -> None:
        self._child = _Child()
        self._finalizer = weakref.finalize(self, self._child.end)
        self._make = lru_cache(KEPT)(self._child.make)

    @staticmethod
    def is_installed() -> bool:
        """Whether there is the package that grammars need."""
        return importlib.util.find_spec("llguidance") is not None

    def make(self, structured: Structured, special_token_id: Callable[[str], int | None]) -> str:
        """The grammar. Raises InvalidRequestError for what cannot be followed.

        special_token_id: the id of the tokenizer's special token that is exactly a text, if there is one.
        """
        if not self.is_installed():
            raise InvalidRequestError(
                "structured output needs the package llguidance, which is not installed: pip install llguidance"
            )
        if isinstance(structured, JsonSchema):
            structured = JsonSchema(structured.text, structured.after, structured.opening)
        texts = {"after_id": structured.after, "opening_id": structured.opening}
        ids = {name: special_token_id(text) if text else None for name, text in texts.items()}
        return self._make(msgspec.json.encode({"structured": structured, **ids}))

    def close(self) -> None:
        self._finalizer()


class _Child:
    """One process at a time; one that hangs or dies is replaced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, job: bytes) -> str:
        """Raises InvalidRequestError."""
        with self._lock:
            answer = self._ask(job)
        if answer is None:
            raise InvalidRequestError(
                f"structured: it does not compile within {COMPILE_S:g} s and the memory for it: make it simpler"
            )
        if answer["problem"]:
            raise InvalidRequestError(f"structured: it cannot be followed: {answer['problem']}")
        return answer["grammar"]

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, job: bytes) -> dict[str, str] | None:
        """None: it took too long, or ended the child."""
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _BUILDER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": import_path()},
                start_new_session=True,  # Ctrl-C is for the program whose child this is
            )
            if not _line(self._process, START_S):
                self.end()
                raise InvalidRequestError(
                    "structured: the process that tries grammars did not start; its reason is in this one's output"
                )
        process = self._process
        assert process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job + b"\n")
            process.stdin.flush()
            if line := _line(process, COMPILE_S):
                return msgspec.json.decode(line, type=dict[str, str])
        self.end()
        return None


def _line(process: "subprocess.Popen[bytes]", patience_s: float) -> bytes:
    """What the child says next; nothing, if that takes too long or the child has ended."""
    assert process.stdout is not None, "it was started with a pipe"
    if not select.select([process.stdout], [], [], patience_s)[0]:
        return b""
    line = process.stdout.readline()
    return line if line.endswith(b"\n") else b""
