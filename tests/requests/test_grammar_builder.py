"""The process that tries grammars: what it makes of each kind, and that it never outlives a hostile one for long."""

import signal
import subprocess
import sys

import msgspec
import pytest

from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex, Structured
from graphgen.requests.grammar_builder import Built, Job
from graphgen.requests.structured import GrammarMaker

HOSTILE = JsonSchema({"allOf": [{"type": "string", "pattern": f".*a{number}.*"} for number in range(40)]})
KINDS: list[Structured] = [JsonSchema({"type": "object"}), Regex("a+"), Choice(["a"]), Grammar('root ::= "a"')]


def test_one_process_answers_job_after_job_and_a_hostile_one_ends_it_though_nobody_else_does() -> None:
    code = "from graphgen.requests import grammar_builder as it; it.CPU_S = 1; it.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        for structured in (*KINDS, Regex("(a"), KINDS[0]):
            child.stdin.write(msgspec.json.encode(Job(structured)) + b"\n")
            child.stdin.flush()
            built = msgspec.json.decode(child.stdout.readline(), type=Built)
            assert bool(built.problem) == (structured == Regex("(a")) == (not built.grammar)
        child.stdin.write(msgspec.json.encode(Job(HOSTILE)) + b"\n")
        child.stdin.flush()
        assert child.wait(60) == -signal.SIGXCPU


def test_an_equal_grammar_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = GrammarMaker()
    first = maker.make(JsonSchema({"type": "object"}), lambda text: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("another process"))
    maker._child.end()
    assert maker.make(JsonSchema('{"type": "object"}'), lambda text: None) == first
    assert maker.make(JsonSchema({"type": "object"}), lambda text: None) == first
    maker.close()
