"""The Node and the C++ client: all vectors, conversations with the mock server, and with `graphgen serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.auth

from graphgen import Engine, SamplingParams
from graphgen.ipc.ggp.framing import server_framing
from graphgen.ipc.ggp.messages import Accepted, Delta, Deltas, Generate, Notice
from graphgen.mock_server.script import Gap, Raw, Reply, Restart, Say, Script, Silence, Wait, built_in_script
from tests.ipc.foreign_clients import LANGUAGES, NODE, TIMEOUT_S, Language, lines_of, play, prepare, start
from tests.ipc.raw_client import RawClient, running_command, running_mock
from tests.ipc.vectors import VectorRecord, given, read_vectors, refuses_wrong_vectors, same, with_defaults

NO_SESSION = msgspec.msgpack.encode({"code": "no_session", "message": "who are you?", "retryable": True})
SAY = Say(("one ", "two ", "three "), every_ms=1)


@pytest.fixture(params=LANGUAGES, ids=lambda language: language.name)
def language(request: pytest.FixtureRequest) -> Language:
    language: Language = request.param
    prepare(language)
    return language


def is_own(vector: VectorRecord) -> bool:
    """Whether only a server's own processes send it."""
    value = vector.value or {}
    return (
        vector.kind == "report"
        or (vector.kind == "stats_request" and bool(value))
        or bool({"routes", "routed"} & {*value})
    )


def streams(*requests: dict[str, Any]) -> dict[str, Any]:
    return {"do": "streams", "requests": list(requests)}


def texts(results: list[Any]) -> list[str]:
    return [result["outputs"][0]["text"] for result in results]


def codes(results: list[Any]) -> list[str]:
    return [result["code"] for result in results]


def test_all_vectors_in_the_direction_of_a_client(language: Language, tmp_path: Path) -> None:
    out = tmp_path / "frames.json"
    command = language.vectors + ([str(out)] if language.name == "cpp" else [])
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "VECTORS_OUT": str(out)}
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    sent = [vector for vector in read_vectors("client.json") if vector.expect == "ok" and not is_own(vector)]
    frames = json.loads(out.read_text())
    assert set(frames) == {vector.name for vector in sent}
    for vector in sent:
        assert vector.kind is not None
        assert vector.value is not None
        decoded = server_framing().decode([bytes.fromhex(frame) for frame in frames[vector.name]])
        expected = with_defaults(vector.kind, vector.value)
        if language.name == "cpp" and expected.get("prompt_ids"):  # which it packs
            packed = b"".join(token.to_bytes(4, "little") for token in expected["prompt_ids"])
            expected = {**expected, "prompt_ids": None, "prompt_u32": packed}
        assert same(decoded, expected), vector.name
        assert given(decoded, vector.value), vector.name


def test_fifty_streams_at_once_each_get_their_own_text(language: Language, tmp_path: Path) -> None:
    prompts = [f"prompt {number} of fifty, é€😀" for number in range(50)]
    with running_mock() as server:
        (results,) = play(language, tmp_path, server.address, [streams(*({"text": prompt} for prompt in prompts))])
    assert texts(results) == prompts
    assert [bytes(result["outputs"][0]["ids"]).decode() for result in results] == prompts


def test_samples_chats_packed_ids_and_whole_outputs(language: Language, tmp_path: Path) -> None:
    with running_mock() as server:
        (results,) = play(
            language,
            tmp_path,
            server.address,
            [
                streams(
                    {"text": "to be", "sampling": {"n": 3, "max_tokens": 4}},
                    {"messages": [{"role": "user", "content": "hi there"}]},
                    {"prompt_u32": {"bin": "6800000069000000"}},
                    {"text": "not streamed", "stream": False},
                    {"text": "unicode"},
                )
            ],
        )
    assert [(output["text"], output["finish"]) for output in results[0]["outputs"]] == [("to b", "length")] * 3
    assert results[0]["output_tokens"] == 12
    assert texts(results[1:]) == ["hi there", "hi", "not streamed", "aé€😀\0e\u0301"]


def test_a_cancelled_stream_ends_at_the_server(language: Language, tmp_path: Path) -> None:
    cancel = {"do": "cancel", "request": {"text": "slow"}, "after": 3}
    steps: list[dict[str, Any]] = [cancel, {"do": "stats"}, streams({"text": "next"})]
    with running_mock() as server:
        cancelled, stats, results = play(language, tmp_path, server.address, steps)
    assert cancelled == {"pieces": 3}
    assert stats == {"open_requests": 0}
    assert texts(results) == ["next"]


def test_what_is_larger_than_a_frame_ends_itself_alone(language: Language, tmp_path: Path) -> None:
    """The server would close the connection."""
    large: list[dict[str, Any]] = [{"text": "x" * 5000}, {"prompt_u32": {"bin": "68000000" * 1200}}]
    said = Say(("one ", "two ", "three "), every_ms=200)
    with running_mock(Script((Reply("beside", (said,)),), frame_bytes=4096)) as server:
        steps = [streams({"text": "beside"}, *large, {"text": "beside"}), streams({"text": "after"})]
        (before, *refused, beside), (after,) = play(language, tmp_path, server.address, steps)
    assert [(result["kind"], result["code"], result["retryable"]) for result in refused] == [
        ("RequestError", "too_large", False)
    ] * 2
    assert texts([before, beside, after]) == ["one two three ", "one two three ", "after"]


def test_every_error_of_the_table_reaches_the_caller_and_ends_nothing_else(language: Language, tmp_path: Path) -> None:
    refusals = [{"text": reply.prompt} for reply in built_in_script().replies if reply.prompt.startswith("error ")]
    refusals = [refusal for refusal in refusals if refusal["text"] != "error no_session"]  # which ends the session
    others = [{"text": "overloaded"}, {"text": "late error"}, {"text": "new error"}, {"text": "x" * 9000}]
    wrong: list[dict[str, Any]] = [{"text": "x", "sampling": {"top_p": 7.0}}, {"text": ""}]
    with running_mock() as server:
        first, second = play(
            language, tmp_path, server.address, [streams(*refusals, *others, *wrong), streams({"text": "after"})]
        )
    assert codes(first[: len(refusals)]) == [refusal["text"].split()[1] for refusal in refusals]
    assert codes(first[len(refusals) :]) == [
        "overloaded",
        "engine_lost",
        "quota_exceeded",
        "never_fits",
        "bad_request",
        "bad_request",
    ]
    assert {result["kind"] for result in first} == {"RequestError"}
    retryable = {result["code"] for result in first if result["retryable"]}
    assert retryable == {"overloaded", "draining", "engine_lost"}
    assert first[len(refusals)]["retry_after_ms"] == 1500
    assert texts(second) == ["after"]


def test_faults_of_a_server_are_told_and_the_next_request_works(language: Language, tmp_path: Path) -> None:
    requests = [streams({"text": text}) for text in ("future", "gap", "after", "garbage", "again")]
    with running_mock() as server:
        future, gap, after, garbage, again = play(language, tmp_path, server.address, requests)
    assert texts(future) == ["one two three four"], "an unknown kind is ignored"
    assert [gap[0]["kind"], garbage[0]["kind"]] == ["ProtocolError"] * 2
    assert texts([*after, *again]) == ["after", "again"]


def test_a_server_that_is_silent_or_started_anew_costs_the_open_requests_alone(
    language: Language, tmp_path: Path
) -> None:
    script = Script(
        replies=(
            Reply("silence", (SAY, Silence(1500))),
            Reply("restart", (SAY, Restart())),
            Reply("forgotten", (SAY, Raw(("47470145", NO_SESSION.hex())))),
        ),
        heartbeat_ms=50,
    )
    steps = [
        streams({"text": "restart"}, {"text": "hang on"}),
        streams({"text": "after the restart"}),
        streams({"text": "forgotten"}),
        streams({"text": "silence"}),
        streams({"text": "after the silence"}),
    ]
    with running_mock(script) as server:
        restarted, after_restart, forgotten, silence, after_silence = play(
            language, tmp_path, server.address, steps, lost_after_ms=800
        )
    assert restarted[0]["kind"] == "ConnectionError"
    assert restarted[0]["retryable"]
    assert codes(forgotten) == ["no_session"]
    assert codes(silence) == ["lost"]
    assert texts([*after_restart, *after_silence]) == ["after the restart", "after the silence"]


def test_a_request_that_a_new_server_does_not_know_is_asked_again(language: Language, tmp_path: Path) -> None:
    """An idle client does not notice a restart: its next request is refused with no_session, and goes through all the
    same."""
    script = Script(replies=(Reply("restart", (Restart(),)),), heartbeat_ms=50)
    with running_mock(script) as server:
        steps = [streams({"text": "first"}), {"do": "pause", "ms": 800}, streams({"text": "asked again"})]
        process = start(language, tmp_path, {"address": server.address, "steps": steps})
        assert process.stdout is not None
        process.stdout.readline()
        restart(server.address)
        _, results = lines_of(process)
    assert texts(results) == ["asked again"]


def restart(address: str) -> None:
    """As another client, with a script in which that is the answer."""
    with RawClient(address) as client:
        client.hello()
        client.send(Generate(id=1, text="restart"))
        client.receive(Accepted)


@pytest.mark.parametrize("timeout_ms", [200, 10_000])
def test_an_address_where_nothing_listens_is_told_at_once(language: Language, tmp_path: Path, timeout_ms: int) -> None:
    prepare(language)
    begun_s = time.monotonic()
    address = "tcp://127.0.0.1:9"
    (results,) = play(language, tmp_path, address, [streams({"text": "x"})], connect_timeout_ms=timeout_ms)
    assert time.monotonic() - begun_s < 5
    assert codes(results) == ["refused"]


def test_a_server_that_says_nothing_is_an_error_in_the_time_that_was_given(language: Language, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        (results,) = play(language, tmp_path, address, [streams({"text": "x"})], connect_timeout_ms=200)
    assert codes(results) == ["timeout"]


def test_curve_lets_a_client_in_by_its_keys(language: Language, tmp_path: Path) -> None:
    public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
    with running_command("graphgen.mock_server", "--curve") as served:
        curve = {"serverKey": served.public_key, "publicKey": public_key, "secretKey": secret_key}
        (results,) = play(language, tmp_path, served.address, [streams({"text": "secret"})], curve=curve)
    assert texts(results) == ["secret"]


def test_curve_against_a_real_server_with_keys_that_were_made_for_it(tmp_path: Path) -> None:
    for language in LANGUAGES:
        prepare(language)
    folder = tmp_path / "keys"
    for name in ([], ["laptop"]):
        subprocess.run([sys.executable, "-m", "graphgen", "keys", "new", *name, "--keys", str(folder)], check=True)
    server_key, _ = zmq.auth.load_certificate(folder / "server.key")
    public_key, secret_key = zmq.auth.load_certificate(folder / "clients" / "laptop.key_secret")
    assert secret_key is not None
    curve = {"serverKey": server_key.decode(), "publicKey": public_key.decode(), "secretKey": secret_key.decode()}
    stranger_public, stranger_secret = (key.decode() for key in zmq.curve_keypair())
    stranger = {**curve, "publicKey": stranger_public, "secretKey": stranger_secret}
    step = [streams({"text": "ROMEO:\n", "sampling": GREEDY})]
    found = []
    with running_command("graphgen", "serve", "--device", "cpu", "--keys", str(folder)) as served:
        for language in LANGUAGES:
            found += texts(play(language, tmp_path, served.address, step, curve=curve)[0])
            (refused,) = play(language, tmp_path, served.address, step, curve=stranger, connect_timeout_ms=500)
            assert codes(refused) == ["timeout"]
    assert len(found) == len(LANGUAGES)
    assert len(set(found)) == 1
    assert found[0]


def test_a_drain_finishes_what_runs_and_refuses_the_rest(language: Language, tmp_path: Path) -> None:
    with running_command("graphgen.mock_server") as served:
        request = {"text": "slow", "sampling": {"max_tokens": 12}}
        plan = {"address": served.address, "steps": [{"do": "drain", "request": request}]}
        process = start(language, tmp_path, plan)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"running": True}
        served.process.send_signal(signal.SIGTERM)
        (result,) = lines_of(process)
        assert served.process.wait(10) == 0
    assert result["refused"]["code"] == "draining"
    assert result["refused"]["retryable"]
    assert result["rest"]["outputs"][0]["text"] == "0 1 2 3 4 5 "


def test_notices_reach_a_program_that_asked_for_them(language: Language, tmp_path: Path) -> None:
    header, body = server_framing().encode(Notice(text="a new worker serves: é"))
    script = Script(replies=(Reply("told", (Raw((header.hex(), body.hex())), Say(("done",)))),))
    with running_mock(script) as server:
        steps = [streams({"text": "told"}), {"do": "notices"}]
        results, said = play(language, tmp_path, server.address, steps)
    assert texts(results) == ["done"]
    assert said == {"notices": ["a new worker serves: é"]}


def test_deltas_of_several_requests_come_in_one_message(language: Language, tmp_path: Path) -> None:
    """Ids are the client's, which count from 1, and are given in whatever order."""
    items = [Delta(id=2, ids=[97], text="a"), Delta(id=1, ids=[97], text="a")]
    header, body = server_framing().encode(Deltas(items=items))
    script = Script(
        replies=(
            Reply("waits", (Wait(800), Gap(1), Say(("nd",)))),
            Reply("tells", (Wait(400), Raw((header.hex(), body.hex())), Wait(400), Gap(1), Say(("long",)))),
        )
    )
    with running_mock(script) as server:
        (results,) = play(language, tmp_path, server.address, [streams({"text": "waits"}, {"text": "tells"})])
    assert texts(results) == ["and", "along"]


def test_what_is_particular_to_node() -> None:
    prepare(LANGUAGES[0])
    with running_mock() as server:
        run = subprocess.run(
            ["node", "--test", str(NODE / "test/client.test.js")],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "SERVER": server.address},
        )
    assert run.returncode == 0, run.stdout


PROMPTS = [
    f"{name}:\n{line}" for name in ("ROMEO", "JULIET", "HAMLET", "KING", "First Citizen") for line in "abcdefghij"
]
GREEDY = {"max_tokens": 24, "temperature": 0}


def test_conversations_with_a_real_server_end_with_its_drain(tmp_path: Path) -> None:
    for language in LANGUAGES:
        prepare(language)
    with Engine(device="cpu") as engine:
        expected = [output.text for output in engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0.0))]
    steps = [
        streams(*({"text": prompt, "sampling": GREEDY} for prompt in PROMPTS)),
        {
            "do": "cancel",
            "request": {"text": "ROMEO:\n", "sampling": {"max_tokens": 400, "ignore_eos": True}},
            "after": 3,
        },
        streams({"text": "x", "sampling": {"top_p": 7}}, {"prompt_ids": [1] * 10_000}, {"prompt_ids": [2**31 - 1]}),
        {"do": "health"},
        {"do": "drain", "request": {"text": "ROMEO:\n", "sampling": {"max_tokens": 300, "ignore_eos": True}}},
    ]
    with running_command("graphgen", "serve", "--device", "cpu") as served:
        with RawClient(served.address) as client:
            refuses_wrong_vectors(client)
        plan = {"address": served.address, "steps": steps}
        programs = [start(language, tmp_path, plan) for language in LANGUAGES]
        before = []
        for program in programs:
            assert program.stdout is not None
            before.append([json.loads(program.stdout.readline()) for _ in range(5)])
        served.process.send_signal(signal.SIGTERM)
        ends = [lines_of(program)[0] for program in programs]
        assert served.process.wait(TIMEOUT_S) == 0
    for results, cancelled, refused, health, running in before:
        assert texts(results) == expected
        assert cancelled == {"pieces": 3}
        assert codes(refused) == ["bad_request", "never_fits", "bad_request"]
        assert health == {"ready": True}
        assert running == {"running": True}
    for end in ends:
        assert end["refused"]["code"] == "draining"
        assert end["rest"]["outputs"][0]["finish"] == "length"
        assert end["rest"]["output_tokens"] == 300
