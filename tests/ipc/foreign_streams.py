"""Streams of a client in another language, whose tokens are seen as they come."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from graphgen import SamplingParams
from tests.ipc.foreign_clients import Language, prepare, start


class ForeignStream:
    """One request and the tokens it has."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.error: object = None
        self.ended = False


@contextlib.contextmanager
def foreign_streams(
    language: Language, folder: Path, address: str, requests: Sequence[tuple[list[int], SamplingParams]]
) -> Iterator[list[ForeignStream]]:
    """A program that has connected and sends these requests now, all at once. It is ended in the end."""
    prepare(language)
    plan = [{"prompt_ids": prompt, "sampling": as_json(sampling)} for prompt, sampling in requests]
    steps = [{"do": "health"}, {"do": "pieces", "requests": plan}]
    streams = [ForeignStream() for _ in requests]
    program = start(language, folder, {"address": address, "steps": steps})
    lines = program.stdout
    assert lines is not None

    def read() -> None:
        for line in lines:
            told = json.loads(line)
            if "stream" in told:
                stream = streams[told["stream"]]
                stream.token_ids += told.get("ids", [])
                stream.ended, stream.error = "end" in told, told.get("end")
        for stream in streams:
            if not stream.ended:
                stream.ended, stream.error = True, f"the {language.name} program ended"

    reader = threading.Thread(target=read, daemon=True)
    try:
        assert lines.readline(), f"the {language.name} program does not connect"
        reader.start()
        yield streams
    finally:
        program.kill()
        program.wait()
        if reader.is_alive():
            reader.join()
        lines.close()


def as_json(sampling: SamplingParams) -> dict[str, int | float | bool | None]:
    names = ("max_tokens", "ignore_eos", "temperature", "seed", "presence_penalty")
    return {name: getattr(sampling, name) for name in names}
