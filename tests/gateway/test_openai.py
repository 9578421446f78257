"""OpenAI's own Python client, unchanged, against `graphgen serve --http`."""

import json
import os
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import graphgen
from graphgen import Client, SamplingParams
from graphgen.server.options import ServeOptions, is_public
from tests import ROOT
from tests.gateway.conftest import HTTP
from tests.serving import ServerProcess, serving

HELLO: Any = [{"role": "user", "content": "Good morrow"}]
LONG = 600


def connect(server: ServerProcess, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **{"max_retries": 0, "timeout": 30.0, **options})


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return connect(server)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def test_a_chat_and_its_stream_are_what_our_own_client_gets(client: openai.OpenAI, ours: Client) -> None:
    (want,) = ours.chat(HELLO, greedy(24))
    got = client.chat.completions.create(model="play", messages=HELLO, max_completion_tokens=24, temperature=0)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == (want.text, want.finish_reason)
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(want.prompt_token_ids), 24)
    assert got.usage.prompt_tokens_details is not None
    assert (got.usage.prompt_tokens_details.cached_tokens or 0) > 0, "the prompt was computed before"
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        model="play", messages=HELLO, max_tokens=24, temperature=0, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == want.text
    assert chunks[-1].usage == got.usage


@pytest.mark.parametrize("num_bytes", [100_000, 200_000, 1_000_000])
def test_a_text_too_long_for_the_way_to_the_engine_is_refused_alone(client: openai.OpenAI, num_bytes: int) -> None:
    """The first is within a frame of the protocol, the others are not."""
    with client.completions.create(model="play", prompt="ROMEO:\n", max_tokens=300, stream=True) as beside:
        next(beside)
        for call in (
            lambda: client.completions.create(model="play", prompt="x" * num_bytes),
            lambda: client.chat.completions.create(
                model="play", messages=[{"role": "user", "content": "x" * num_bytes}]
            ),
            lambda: client.responses.create(model="play", input="x" * num_bytes),
        ):
            with pytest.raises(openai.BadRequestError, match="the limit is") as caught:
                call()
            assert caught.value.code == "context_length_exceeded"
        assert client.completions.create(model="play", prompt="hi", max_tokens=3).usage
        assert sum(len(chunk.choices) for chunk in beside) > 0


def test_biases_are_those_of_our_own_client_and_of_known_tokens(client: openai.OpenAI, ours: Client) -> None:
    (plain,) = ours.generate("ROMEO:\n", greedy(12))
    banned = dict.fromkeys(plain.token_ids, -100.0)
    (want,) = ours.generate("ROMEO:\n", SamplingParams(max_tokens=12, temperature=0.0, logit_bias=banned))
    assert not set(want.token_ids) & set(plain.token_ids)
    biases = {str(token): int(bias) for token, bias in banned.items()}
    got = client.completions.create(model="play", prompt="ROMEO:\n", max_tokens=12, temperature=0, logit_bias=biases)
    assert got.choices[0].text == want.text
    with pytest.raises(openai.BadRequestError, match="logit_bias has token id 99999, the vocabulary is 0 to"):
        client.chat.completions.create(model="play", messages=HELLO, logit_bias={"99999": 1})


def test_completions_of_texts_and_ids_are_what_our_own_client_gets(client: openai.OpenAI, ours: Client) -> None:
    prompts = ["ROMEO:\n", "To be, or"]
    want = ours.generate(prompts, greedy(20))
    got = client.completions.create(model="play", prompt=prompts, max_tokens=20, temperature=0)
    assert [choice.text for choice in got.choices] == [output.text for output in want]
    ids = [list(output.prompt_token_ids) for output in want]
    got = client.completions.create(model="play", prompt=ids, max_tokens=20, temperature=0)
    assert [choice.text for choice in got.choices] == [output.text for output in want]
    stopped = client.completions.create(model="play", prompt="ROMEO:\n", max_tokens=20, temperature=0, stop=" ")
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (want[0].text.split(" ")[0], "stop")


def test_a_response_is_that_of_a_chat_streamed_or_not(client: openai.OpenAI, ours: Client) -> None:
    (want,) = ours.chat(HELLO, greedy(24))
    asked: Any = {"model": "play", "input": HELLO, "max_output_tokens": 24, "temperature": 0}
    got = client.responses.create(**asked)
    assert (got.output_text, got.status) == (want.text, "incomplete")
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.incomplete"
    assert "".join(deltas) == last.response.output_text == want.text
    assert last.response.usage is not None
    assert last.response.usage.input_tokens == len(want.prompt_token_ids)


def test_prompts_become_tokens_and_tokens_text_at_the_server(client: openai.OpenAI, ours: Client) -> None:
    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return client.post(f"../{path}", body=body, cast_to=dict[str, Any])

    info = client.get("../tokenizer_info", cast_to=dict[str, Any])
    assert "add_generation_prompt" in info["chat_template"]
    (output,) = ours.generate("ROMEO:", greedy(4))
    tokens = ask("tokenize", {"prompt": "ROMEO:"})
    assert tokens["tokens"] == list(output.prompt_token_ids)
    assert ask("detokenize", {"tokens": tokens["tokens"]})["prompt"].endswith("ROMEO:")
    (chat,) = ours.chat(HELLO, greedy(4))
    assert ask("tokenize", {"messages": HELLO})["tokens"] == list(chat.prompt_token_ids)
    echoed = client.completions.create(model="play", prompt=tokens["tokens"], echo=True, max_tokens=4, temperature=0)
    assert echoed.choices[0].text.endswith("ROMEO:" + output.text)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask("detokenize", {"tokens": [1] * 5000})
    assert ask("tokenize", {"prompt": "ROMEO:" * 1000})["count"] > ask("tokenize", {"prompt": "x"})["max_model_len"]


def test_many_streams_at_once_are_each_their_own(client: openai.OpenAI, ours: Client) -> None:
    prompts = [f"{name}:\n{letter}" for name in ("ROMEO", "JULIET") for letter in "abcdefgh"]
    want = [output.text for output in ours.generate(prompts, greedy(16))]

    def read(prompt: str) -> str:
        stream = client.completions.create(model="play", prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(read, prompts)) == want


def test_more_prompts_than_a_client_may_have_open_are_refused_for_good(client: openai.OpenAI) -> None:
    limit = ServeOptions().open_requests
    with pytest.raises(openai.BadRequestError, match=f"are {limit + 1} requests, a client may have {limit} open"):
        client.completions.create(model="play", prompt=["x"] * (limit + 1), max_tokens=1)


def test_errors_are_those_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="play", prompt="x", temperature=-1)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_request")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="play", prompt=[1] * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as late:
        client.completions.create(model="play", prompt="x", extra_body={"deadline_ms": 0.001})
    assert late.value.status_code == 408


def test_models_are_named_as_the_operator_named_them(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "play"
    assert client.models.retrieve("play").id == "play"


@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_engine(
    client: openai.OpenAI, ours: Client, server: ServerProcess, whole: bool
) -> None:
    endless: Any = {"ignore_eos": True}
    if whole:
        with pytest.raises(openai.APITimeoutError):
            connect(server, timeout=0.3).completions.create(
                model="play", prompt="x", max_tokens=LONG, extra_body=endless
            )
    else:
        with client.completions.create(
            model="play", prompt="x", max_tokens=LONG, stream=True, extra_body=endless
        ) as stream:
            next(iter(stream))
            assert ours.stats().open_requests == 1
    deadline_s = time.monotonic() + 5
    while ours.stats().open_requests and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert ours.stats().open_requests == 0


def test_a_gateway_that_dies_is_started_again_and_a_drain_finishes_what_is_open(tmp_path: Path) -> None:
    with serving(tmp_path, *HTTP) as server, Client(server.address) as ours:
        client = connect(server)
        with ours.stream("ROMEO:", SamplingParams(max_tokens=LONG, ignore_eos=True)) as stream:
            next(stream)
            assert client.models.list().data
            os.kill(server.pid_of("graphgen.gateway"), signal.SIGKILL)
            assert connect(server, max_retries=2).models.list().data, "the next one waits in the socket's queue"
            assert next(stream).token_ids, "others saw nothing of it"
        with client.completions.create(
            model="play", prompt="x", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
        ) as answer:
            texts = [next(iter(answer)).choices[0].text]
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(model="play", prompt="x")
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"] == "1"
            last = None
            for chunk in answer:
                texts.append(chunk.choices[0].text)
                last = chunk.choices[0].finish_reason
        assert last == "length"
        assert len("".join(texts)) > LONG
        assert server.process.wait(20) == 0


def test_the_program_of_the_docs_runs(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    program, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)  # the other: test_tools.py
    (body,) = re.findall(r"-d '(\{.*?\})'", text)
    for said in ("http://127.0.0.1:8000", '"demo"'):
        assert said in program
    exec(program.replace("http://127.0.0.1:8000", server.url).replace('"demo"', '"play"'), {})
    assert len(capsys.readouterr().out) > 20
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body.replace('"demo"', '"play"').encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"]


def test_an_address_of_http_has_a_host_and_a_port() -> None:
    for wrong in ("8000", "localhost", "localhost:http", ":8000", "127.0.0.1:70000"):
        with pytest.raises(graphgen.ConfigError, match="HOST:PORT"):
            ServeOptions(http=wrong)
    assert [is_public(f"tcp://{one}") for one in ("[::1]:80", "localhost:80", "[::]:80")] == [False, False, True]
