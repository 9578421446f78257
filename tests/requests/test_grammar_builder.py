"""The process that tries grammars: what it makes of each kind, and that it never outlives a hostile one for long."""

import signal
import subprocess
import sys

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex, Structured
from graphgen.requests.grammar_builder import Built, Job, build
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


def takes(job: Job, *token_ids: int) -> bool:
    """Of the bytes and two special tokens, 256 and 257: whether they are an output."""
    vocabulary = Backend(models.BPE(bytes_as_tokens(), []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens(["<open>", "<close>"])
    matcher = LLMatcher(LLTokenizer(vocabulary.to_str(), eos_token=257), build(job))
    return bool(matcher.consume_tokens(list(token_ids)) and matcher.is_accepting())


def bytes_as_tokens() -> dict[str, int]:
    return {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def ids(text: str) -> list[int]:
    return [bytes_as_tokens()[character] for character in text]


DIGITS = Regex("[0-9]{2}", after="</t>")
OPENED = Regex("[0-9]{2}", after="</t>", opening="<t>")
OPEN, CLOSE = 256, 257


def test_a_structure_comes_behind_what_a_tag_ends_and_at_once_where_no_tag_opens_it() -> None:
    assert takes(Job(DIGITS), *ids("a1</t>12"))
    assert not takes(Job(DIGITS), *ids("12"))
    assert takes(Job(OPENED), *ids("12"))
    assert takes(Job(OPENED), *ids("<t>a1</t>12"))
    assert not takes(Job(OPENED), *ids("a1</t>12"))
    assert not takes(Job(OPENED), *ids("<t>12"))


def test_tags_that_are_special_tokens_are_these_alone() -> None:
    job = Job(OPENED, opening_id=OPEN, after_id=CLOSE)
    assert takes(job, *ids("12"))
    assert takes(job, OPEN, *ids("a</t>"), CLOSE, *ids("12"))
    assert not takes(job, *ids("<t>a</t>12"))
    assert not takes(job, OPEN, *ids("12"))
    assert takes(Job(DIGITS, after_id=CLOSE), *ids("a"), CLOSE, *ids("12"))
