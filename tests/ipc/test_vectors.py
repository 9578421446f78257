"""The conformance vectors: they are what their generator writes, and the Python codec agrees with each of them."""

from collections import Counter
from typing import Any

import pytest

from graphgen.ipc.ggp.codes import CODES
from graphgen.ipc.ggp.framing import FrameError, Framing, client_framing, server_framing
from graphgen.ipc.ggp.messages import NAMES
from graphgen.ipc.vectors.make import files
from tests.ipc.vectors import FOLDER, VectorRecord, given, read_vectors, same, with_defaults

CLIENT, SERVER = read_vectors("client.json"), read_vectors("server.json")
FRAMINGS: dict[str, Framing[Any, Any]] = {"client": server_framing(), "server": client_framing()}
KINDS = {name: kind for kind, name in NAMES.items()}


BOTH = [
    *(pytest.param("client", vector, id=vector.name) for vector in CLIENT),
    *(pytest.param("server", vector, id=vector.name) for vector in SERVER),
]


@pytest.mark.parametrize("name", ["client.json", "server.json", "defaults.json"])
def test_a_file_is_what_its_generator_writes(name: str) -> None:
    assert (FOLDER / name).read_text() == files()[name], "run `python -m graphgen.ipc.vectors.make`"


def test_there_are_enough_and_a_third_of_them_are_wrong() -> None:
    wrong = [vector for vector in (*CLIENT, *SERVER) if vector.expect not in ("ok", "ignore")]
    assert len(CLIENT) + len(SERVER) >= 150
    assert 3 * len(wrong) >= len(CLIENT) + len(SERVER)
    assert {vector.expect for vector in wrong} <= set(CODES)
    readme = (FOLDER / "README.md").read_text()
    assert f"{len(CLIENT) + len(SERVER)} messages, {len(wrong)} of them wrong" in readme


def test_every_kind_and_every_sampling_field_is_sent_by_a_vector() -> None:
    kinds = Counter(vector.kind for vector in (*CLIENT, *SERVER) if vector.expect == "ok")
    assert set(kinds) == set(NAMES.values())
    fields = {field for vector in CLIENT for field in (vector.value or {}).get("sampling", {})}
    assert fields == set(with_defaults("sampling", {}))


@pytest.mark.parametrize(("sender", "vector"), BOTH)
def test_the_codec_agrees_with_a_vector(sender: str, vector: VectorRecord) -> None:
    frames = vector.frame_bytes()
    if vector.expect == "ok" or vector.checked_by == "server":
        decoded = FRAMINGS[sender].decode(frames)
        assert vector.kind is not None
        assert type(decoded) is KINDS[vector.kind]
        if vector.value is not None:
            assert same(decoded, with_defaults(vector.kind, vector.value))
            assert given(decoded, vector.value)
        return
    with pytest.raises(FrameError) as caught:
        FRAMINGS[sender].decode(frames)
    if vector.expect == "ignore":
        assert caught.value.error.code == "bad_frame"  # what an unknown kind is to the codec; a client drops it
        return
    assert caught.value.error.code == vector.expect
    if sender == "client":
        assert vector.allows_error_id(caught.value.error.id)
