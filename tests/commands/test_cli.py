"""The command line as a user runs it."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import pytest

from graphgen import __version__
from graphgen.commands.demo_run import background_prompts, percentile
from tests.commands.in_process import run_forked, run_here

SMALL = ("--token-budget", "8", "--device", "cpu")


def run(arguments: Sequence[str], stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "graphgen", *arguments], input=stdin, capture_output=True, text=True, timeout=120
    )


def test_generate_streams_the_same_text_for_an_argument_and_for_standard_input() -> None:
    options = ("--max-tokens", "12", "--temperature", "0", *SMALL)
    argument = run(["generate", "To be, or", *options])
    piped = run(["generate", "-", *options], stdin="To be, or")
    assert argument.returncode == 0, argument.stderr
    assert len(argument.stdout) > 5
    assert argument.stdout == piped.stdout
    assert argument.stderr.startswith("12 tokens, finished by length; ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/no/such/model"], "/no/such/model"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--token-budget", "7"], "token_budget is 7"),
        (["info", "--device", "tpu"], "device is 'tpu'"),
        (["serve", "--model", "/tmp/" + "x" * 300], "File name too long (/tmp/xxx"),
        (["serve", "--keys", "/tmp/" + "x" * 300], "File name too long (/tmp/xxx"),
        (["replicas", "show", "--server", "/tmp/" + "x" * 300], "File name too long (/tmp/xxx"),
        (["serve", "--device", "cpu", "--replicas", "999999999999"], "replicas is 999999999999, 999999999999 workers"),
        (["serve", "--replicas", str(10**20)], f"replicas is {10**20}, the limit is {2**63 - 1}"),
        (["serve", "--num-pages", str(10**20)], f"num_pages is {10**20}, the limit is {2**63 - 1}"),
        (["serve", "--open-requests", str(2**20 + 1)], "open_requests is 1048577, the limit is 1048576: lower it"),
        (["serve", "--engines", "tcp://127.0.0.1:6001,tcp://*:6001"], "tcp://*:6001 is an address to bind"),
        (["health", "--address", "tcp://*:6001"], "tcp://*:6001 is an address to bind"),
        (["cluster", "up", "--engines", str(10**20)], f"engines is {10**20}, the limit is {2**63 - 1}"),
    ],
)
def test_errors_are_one_message_without_a_trace(arguments: list[str], words: str) -> None:
    done = run_forked(arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("graphgen: ")
    assert "".join(words.split()) in "".join(done.stderr.split())  # lines are broken, also in a long word
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/graphgen-x")

    monkeypatch.setattr(tempfile, "mkdtemp", fill)
    done = run_here(["generate", "x", *SMALL], monkeypatch, capsys)
    assert done.returncode == 2
    told = "graphgen: No space left on device (/tmp/graphgen-x): free some, or name a folder of another disk by TMPDIR"
    assert " ".join(done.stderr.split()) == told


def test_what_the_system_refuses_for_another_reason_keeps_its_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run_here(["generate", "x", *SMALL], monkeypatch, capsys)


def test_info_prints_versions_decisions_buckets_and_phases() -> None:
    done = run(["info", *SMALL])
    assert done.returncode == 0, done.stderr
    for words in ("torch", "you asked for it", "max_position_embeddings", "decode rows", "load", "KV cache"):
        assert words in done.stdout


def test_info_as_json_says_the_same_to_programs() -> None:
    done = run(["info", "--json", *SMALL])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["versions"]["graphgen"] == __version__
    assert told["versions"]["torch"]
    assert told["decisions"]["device"] == {"value": "cpu", "why": "you asked for it"}
    assert {"load", "capture"} <= {phase["name"] for phase in told["phases"]}
    assert all(bucket["prefill_rows"] + bucket["decode_rows"] <= 8 for bucket in told["buckets"])
    assert 0 < told["start_s"] < 120


def test_demo_prints_text_and_figures() -> None:
    done = run(["demo", "--max-tokens", "8", "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:\n")
    for words in ("TTFT p50", "ITL p99", "padding share", "steps", "13", "load"):
        assert words in done.stdout


def test_demo_prompts_are_of_many_lengths_and_start_speeches() -> None:
    prompts = background_prompts()
    lengths = [len(prompt) for prompt in prompts]
    assert len(prompts) == 12
    assert max(lengths) > 20 * min(lengths)
    assert all(prompt.split("\n")[0].endswith(":") for prompt in prompts)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([3.0], 50) == 3.0
    assert percentile([], 50) == 0.0
