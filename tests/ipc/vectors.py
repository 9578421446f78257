"""The conformance vectors as the tests read them: from the JSON files, as a program in any language would."""

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

import graphgen.ipc
from graphgen.ipc.ggp.messages import Error, Generate, SamplingDefaults
from tests.ipc.raw_client import RawClient

FOLDER = Path(graphgen.ipc.__file__).parent / "vectors"


class VectorRecord(msgspec.Struct, frozen=True):
    """One line of client.json or server.json; README.md in its folder has the fields."""

    name: str
    kind: str | None
    meaning: str
    frames: list[str | list[tuple[str, int]]]
    expect: str
    checked_by: str = "decoder"
    value: dict[str, Any] | None = None  # any message
    error_id: int | None = None

    def allows_error_id(self, found: int | None) -> bool:
        """Of a map that cannot be read as a whole, some decoders find the id all the same."""
        return found == self.error_id or self.expect == "bad_frame"

    def frame_bytes(self) -> list[bytes]:
        return [_bytes(frame) for frame in self.frames]


def read_vectors(file_name: str) -> list[VectorRecord]:
    return msgspec.json.decode((FOLDER / file_name).read_bytes(), type=list[VectorRecord])


def with_defaults(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    """The whole message that a vector's value means: every field, and bytes as bytes."""
    defaults = json.loads((FOLDER / "defaults.json").read_text())
    whole = {**defaults.get(kind, {}), **value}
    for field in ("sampling", "limits", "sampling_defaults", "usage", "routed"):
        if isinstance(whole.get(field), dict):
            whole[field] = {**defaults[field], **whole[field]}
    if whole.get("messages"):
        whole["messages"] = [{**defaults["chat_message"], **message} for message in whole["messages"]]
    if "items" in whole:
        whole["items"] = [{**defaults["delta"], **item} for item in whole["items"]]
    for field in ("logprobs", "prompt_logprobs"):
        if isinstance(whole.get(field), dict):
            whole[field] = {**defaults["logprobs"], **whole[field]}
    found: dict[str, Any] = _with_bytes(whole)
    return found


def _with_bytes(value: Any) -> Any:  # any part of a message
    """Bytes are written as {"bin": "hex"}."""
    if isinstance(value, list):
        return [_with_bytes(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bin"}:
        return bytes.fromhex(value["bin"])
    return {key: _with_bytes(item) for key, item in value.items()}


def same(found: object, expected: object) -> bool:
    """Every field of `expected` is there and equal, and a float where a float is meant."""
    if isinstance(expected, dict):
        return all(same(_field(found, key), value) for key, value in expected.items())
    if isinstance(expected, list):
        items = list(found) if isinstance(found, (list, tuple)) else []
        return len(items) == len(expected) and all(map(same, items, expected))
    return found == expected and isinstance(found, float) == isinstance(expected, float)


def given(found: object, value: dict[str, Any]) -> bool:
    """Whether of the sampling values that a model may decide just those of `value` were sent."""
    if not isinstance(found, Generate):
        return True
    sent = {name for name in SamplingDefaults.__struct_fields__ if getattr(found.sampling, name) is not UNSET}
    return sent == set(value.get("sampling", {})) & set(SamplingDefaults.__struct_fields__)


def refuses_wrong_vectors(client: RawClient) -> None:
    """A server answers each wrong message of a client with the error that it should have, and lives on."""
    frame_limit = client.hello().limits.frame_bytes
    for vector in read_vectors("client.json"):
        frames = vector.frame_bytes()
        # A frame above the limit closes the connection, as it should, but that is no answer.
        if vector.expect == "ok" or max(map(len, frames)) > frame_limit:
            continue
        client.send_frames(frames)
        answer = client.receive(Error)
        assert answer.code == vector.expect, vector.name
        assert vector.allows_error_id(answer.id), vector.name
    assert client.ends_with_pong(1) == []


def _field(found: object, key: str) -> object:
    if isinstance(found, dict):
        return found[key]
    value = getattr(found, key)
    return getattr(SamplingDefaults(), key) if value is UNSET else value


def _bytes(frame: str | list[tuple[str, int]]) -> bytes:
    if isinstance(frame, str):
        return bytes.fromhex(frame)
    return b"".join(bytes.fromhex(piece) * times for piece, times in frame)
