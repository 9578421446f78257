"""Writes the vectors as JSON, for programs in any language.

`python -m graphgen.ipc.vectors.make` writes `client.json`, `server.json` and `defaults.json` beside this file; a test
fails when they are not what it would write. README.md describes them.
"""

import json
from pathlib import Path

from graphgen.ipc.vectors.client_accepted import CLIENT_ACCEPTED, CLIENT_IMPOSSIBLE
from graphgen.ipc.vectors.client_refused import CLIENT_REFUSED
from graphgen.ipc.vectors.defaults import DEFAULTS, KINDS
from graphgen.ipc.vectors.server_accepted import SERVER_ACCEPTED
from graphgen.ipc.vectors.server_refused import SERVER_IGNORED, SERVER_REFUSED
from graphgen.ipc.vectors.wire import Frame, Value, Vector

FOLDER = Path(__file__).parent


def files() -> dict[str, str]:
    """Name of a file -> its text."""
    client = [
        *(_record(vector) for vector in CLIENT_ACCEPTED),
        *(_record(vector) for vector in CLIENT_REFUSED),
        *(_record(vector, checked_by="server") for vector in CLIENT_IMPOSSIBLE),
    ]
    server = [_record(vector) for vector in (*SERVER_ACCEPTED, *SERVER_IGNORED, *SERVER_REFUSED)]
    names = [str(record["name"]) for record in (*client, *server)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names of vectors occur twice: {twice}: give each its own")
    defaults = json.dumps(DEFAULTS, indent=1, ensure_ascii=True) + "\n"
    return {"client.json": _lines(client), "server.json": _lines(server), "defaults.json": defaults}


def _record(vector: Vector, checked_by: str = "decoder") -> dict[str, object]:
    record: dict[str, object] = {"name": vector.name, "kind": _kind(vector), "meaning": vector.meaning}
    record["frames"] = [_hex(frame) for frame in vector.frames]
    record["expect"] = vector.expect
    if checked_by != "decoder":
        record["checked_by"] = checked_by
    if vector.value is not None:
        record["value"] = vector.value
    if vector.error_id is not None:
        record["error_id"] = vector.error_id
    return record


def _kind(vector: Vector) -> Value:
    """The kind by its name, null where the header has none."""
    header = vector.frames[0]
    if isinstance(header, list) or len(header) != 4 or header[:3] != b"GG\x01":
        return None
    return KINDS.get(header[3:].decode())


def _hex(frame: Frame) -> object:
    if isinstance(frame, bytes):
        return frame.hex()
    return [[repeat.piece.hex(), repeat.times] for repeat in frame]


def _lines(records: list[dict[str, object]]) -> str:
    """One vector a line, so that a change of one is a change of one line."""
    return "[\n" + ",\n".join(json.dumps(record, ensure_ascii=True) for record in records) + "\n]\n"


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
