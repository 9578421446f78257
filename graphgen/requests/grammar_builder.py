"""`python -m graphgen.requests.grammar_builder`: makes grammars for the worker and tries them, one after another.

Owns how each kind of structure is written for llguidance: white space of JSON bounded, what cannot be enforced refused.
A process of its own, since a hostile grammar may compile for hours and no thread can be stopped. Reads a Job a line and
answers each with a Grammar a line, as JSON; ends with its input. `graphgen.requests.structured` starts it.
"""

import contextlib
import json
import math
import resource
import sys

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark
from msgspec import Struct

from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex, Structured
from graphgen.launch.grammar_limits import parser_limits

MAX_SPACE = 8
"""Characters of white space between two tokens of JSON: models that may write any number of them do not stop."""
MEMORY_BYTES = 2 << 30
"""Of this process's address space."""
CPU_S = 10
"""For one grammar; then the process ends."""


class Job(Struct, frozen=True):
    """What an output must follow."""

    structured: Structured
    after_id: int | None = None  # of the special token that `after` is, if it is one
    opening_id: int | None = None  # likewise


class Built(Struct, frozen=True):
    """A grammar as the worker takes it, or what is wrong with it."""

    grammar: str = ""
    problem: str = ""


class BadStructureError(Exception):
    """What cannot be followed; the message says why."""


def build(job: Job) -> str:
    """Raises BadStructureError."""
    answer = _answer(job.structured)
    whole = {"name": "whole", "lark_grammar": _whole(job)}
    grammar = json.dumps({"grammars": [whole, {"name": "answer", **answer}]})
    is_bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=parser_limits())
    if is_bad:
        raise BadStructureError(messages[0])
    return grammar


def _whole(job: Job) -> str:
    """The answer, alone or behind free text and a tag; behind these only if a tag opens them, where there is one."""
    after, opening = job.structured.after, job.structured.opening
    if not after:
        return "start: @answer"
    if job.after_id is not None:
        section, free = f"free <[{job.after_id}]>", "free: /(?s:.*)/"
    else:
        section, free = "free", f"free[lazy]: /(?s:.*){_literal(after)}/"
    if not opening:
        return f"start: {section} @answer\n{free}"
    opens = f"/{_literal(opening)}/" if job.opening_id is None else f"<[{job.opening_id}]>"
    return f"start: @answer | {opens} {section} @answer\n{free}"


def _literal(text: str) -> str:
    """In a regular expression."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _answer(structured: Structured) -> dict[str, object]:
    match structured:
        case JsonSchema():
            return {"json_schema": _schema(structured.text)}
        case Regex():
            grammar: dict[str, object] = json.loads(LLMatcher.grammar_from_regex(structured.pattern))["grammars"][0]
            return {"lark_grammar": grammar["lark_grammar"]}
        case Choice():
            return {"lark_grammar": "start: " + " | ".join(json.dumps(option) for option in structured.options)}
        case Grammar():
            try:
                return {"lark_grammar": any_to_lark(structured.text)}
            except Exception as error:  # the converter raises whatever it likes
                raise BadStructureError(str(error)) from None


def _schema(text: str) -> dict[str, object]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadStructureError(f"it is no JSON ({error})") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise BadStructureError(f"it is {text[:40]}, which is no object: no output could follow it")
    options = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{0,{MAX_SPACE}}}", "lenient": False}
    return {**schema, "x-guidance": options}  # the schema's own options do not count


def _limit_cpu() -> None:
    """For the next grammar: who waits for it gives up much earlier, unless it was killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(usage.ru_utime + usage.ru_stime) + CPU_S, hard))


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # a limit that is lower already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    jobs, answers = msgspec.json.Decoder(Job), msgspec.json.Encoder()
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        _limit_cpu()
        try:
            built = Built(build(jobs.decode(line)))
        except Exception as error:  # BadStructureError, and what else llguidance and json may raise
            built = Built(problem=str(error) or type(error).__name__)
        sys.stdout.buffer.write(answers.encode(built) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
