"""Prompts and chats in every form that a user may give them, and calls that wait for whole outputs: of engines and
clients alike, on a thread and in a loop."""

import asyncio
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from graphgen import Chat, InvalidRequestError, OverloadedError, RequestOutput, SamplingParams
from graphgen.calls.calls import AsyncCalls, Calls
from graphgen.calls.outputs import Sink, StreamPiece, Timing
from tests.fakes import FakeCore

HELLO = [{"role": "user", "content": "Good morrow"}]
LONGER = [{"role": "system", "content": "Speak."}, *HELLO]
NESTED: dict[str, Any] = {}
for _ in range(25):
    NESTED = {"a": NESTED}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Good"}, {"type": "text", "text": "morrow"}]}]


class EchoCore(FakeCore):
    """Answers each prompt with its number, the last first, from another thread."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None

    def answer(self, sinks: Sequence[Sink], num_samples: int, streams: bool) -> None:
        threading.Thread(target=self._answer, args=(list(sinks), num_samples, streams)).start()

    def _answer(self, sinks: list[Sink], num_samples: int, streams: bool) -> None:
        for number, sink in reversed(list(enumerate(sinks))):
            for sample in reversed(range(num_samples)):
                if self.failure is not None and number == 0:
                    sink(self.failure)
                elif streams:
                    sink(StreamPiece(f"{number}", (number,), "stop", sample_index=sample))
                else:
                    timing = Timing(0.0, 0.0, 0.0, ())
                    sink(RequestOutput(0, (), (number,), f"{number}", "stop", timing, sample_index=sample))


class Caller:
    """The same calls on a thread and in a loop."""

    def __init__(self, is_async: bool) -> None:
        self.core = EchoCore()
        self._sync, self._async = Calls(self.core), AsyncCalls(self.core)
        self._is_async = is_async

    def generate(self, *arguments: Any) -> list[RequestOutput]:
        return self._call(self._sync.generate, self._async.complete, *arguments)

    def chat(self, *arguments: Any, **further: Any) -> list[RequestOutput]:
        calls = (functools.partial(chat, **further) for chat in (self._sync.chat, self._async.chat))
        return self._call(*calls, *arguments)

    def stream(self, *arguments: Any) -> list[StreamPiece]:
        async def read() -> list[StreamPiece]:
            return [piece async for piece in self._async.generate(*arguments)]

        return asyncio.run(read()) if self._is_async else list(self._sync.stream(*arguments))

    def _call(self, call: Callable[..., Any], async_call: Callable[..., Any], *arguments: Any) -> list[RequestOutput]:
        result: list[RequestOutput] = asyncio.run(async_call(*arguments)) if self._is_async else call(*arguments)
        return result


@pytest.fixture(params=["thread", "loop"])
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param == "loop")


@pytest.mark.parametrize(
    ("given", "chats"),
    [
        (HELLO, [HELLO]),
        (LONGER, [LONGER]),
        (tuple(LONGER), [LONGER]),
        (Chat(HELLO), [HELLO]),
        ([HELLO, LONGER], [HELLO, LONGER]),
        ([Chat(HELLO), LONGER], [HELLO, LONGER]),
        (PARTS, [[{"role": "user", "content": "Good\nmorrow"}]]),
        ([{"role": "user", "content": "x", "name": None}], [[{"role": "user", "content": "x"}]]),
    ],
)
def test_a_chat_may_be_given_in_every_form(caller: Caller, given: Any, chats: list[Any]) -> None:
    outputs = caller.chat(given)
    assert [output.text for output in outputs] == [str(number) for number in range(len(chats))]
    assert caller.core.prompts == [Chat(chat) for chat in chats]
    caller.generate(given)
    assert caller.core.prompts == [Chat(chat) for chat in chats * 2]


def _call(arguments: object) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize("arguments", ['{"a": [1, null, "é"]}', {"a": (1, None, "é")}])
def test_the_arguments_of_a_tool_call_are_data_however_they_are_given(caller: Caller, arguments: Any) -> None:
    chat = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [_call(arguments)], "refusal": None},
        {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "c1", "name": "add"},
    ]
    caller.chat(chat)
    (found,) = caller.core.prompts
    assert isinstance(found, Chat)
    assert found.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [_call({"a": [1, None, "é"]})]},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
    ]


def test_arguments_of_a_template_are_those_of_the_call_where_a_chat_has_none(caller: Caller) -> None:
    tools: list[dict[str, Any]] = [{"type": "function"}]
    own = Chat(HELLO, tools=[], chat_template_kwargs={"enable_thinking": True})
    caller.chat([HELLO, own], tools=tools, documents=[{"a": 1}], chat_template_kwargs={"enable_thinking": False})
    assert caller.core.prompts == [
        Chat(HELLO, tools, [{"a": 1}], {"enable_thinking": False}),
        Chat(HELLO, [], [{"a": 1}], {"enable_thinking": True}),
    ]


def test_a_stream_takes_chats_too(caller: Caller) -> None:
    for prompt in (HELLO, Chat(HELLO), PARTS):
        assert [piece.text for piece in caller.stream(prompt)] == ["0"]
    assert caller.core.prompts[:2] == [Chat(HELLO), Chat(HELLO)]


def test_whole_outputs_come_in_the_order_of_prompts_and_samples(caller: Caller) -> None:
    outputs = caller.generate(["a", [1, 2], HELLO], SamplingParams(n=2))
    assert [(output.text, output.sample_index) for output in outputs] == [(f"{i}", j) for i in range(3) for j in (0, 1)]
    assert caller.core.prompts == ["a", [1, 2], Chat(HELLO)]
    assert not caller.core.cancelled


def test_a_failed_prompt_ends_the_others_of_its_call(caller: Caller) -> None:
    caller.core.failure = OverloadedError("full", 1.0)
    with pytest.raises(OverloadedError):
        caller.generate(["a", "b", "c"])
    assert caller.core.cancelled == [0, 1, 2]


def test_a_cancelled_task_ends_the_requests_of_its_call() -> None:
    core = FakeCore()

    async def scenario() -> None:
        task = asyncio.create_task(AsyncCalls(core).complete(["a", "b"]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert core.cancelled == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([], "give a list of messages"),
        ("hello", "give a list of messages"),
        (3, "of type int"),
        ([1, 2, 3], "give a list of messages"),
        (["hello"], "give a list of messages"),
        ([[]], "give a list of messages"),
        (Chat([]), "no messages"),
        ([{"content": "x"}], "role of a chat message is None: give system, user, assistant"),
        ([{"role": 3, "content": "x"}], "role of a chat message is 3"),
        ([{"role": "user"}], "content of a chat message is None"),
        ([{"role": "user", "content": 3}], "content of a chat message is 3"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url.*other parts are not"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "a tool call is 1: give"),
        ([{"role": "assistant", "content": "", "tool_calls": {"id": 1}}], "tool_calls of a chat message is"),
        ([{"role": "assistant", "content": "", "tool_calls": [_call("{")]}], "arguments of a tool call.*no JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": [_call({"a": b"x"})]}], "a tool call holds b'x'"),
        ([{"role": "user", "content": "x", "name": 3}], "name of a chat message is 3: give text"),
        ([{"role": "user", "content": "x", "weight": 1}], "'weight', which is not served: it may have role, content"),
        (Chat(HELLO, tools=cast(Any, ["add"])), "tools is .*give a list of dicts"),
        (Chat(HELLO, documents=cast(Any, {"a": 1})), "documents is .*give a list of dicts"),
        (Chat(HELLO, tools=[{"a": {1: 2}}]), "tools holds {1: 2}"),
        (Chat(HELLO, tools=[{"a": math.inf}]), "tools holds inf"),
        (Chat(HELLO, tools=[NESTED]), "tools has values nested more than 24 deep"),
        (Chat(HELLO, chat_template_kwargs=cast(Any, {"a": [1]})), r"chat_template_kwargs has 'a': \[1\]"),
        (Chat(HELLO, chat_template_kwargs=cast(Any, [1])), "chat_template_kwargs is"),
        ([{"role": "user", "content": "x"}, "y"], "a chat message is 'y'"),
    ],
)
def test_what_is_no_chat_is_refused_with_what_a_chat_is(caller: Caller, wrong: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        caller.chat(wrong)
    assert not caller.core.prompts


@pytest.mark.parametrize("wrong", [3, None, {"role": "user"}, b"x", [1.5], [True], ["a", 3], [[1], ["a"]]])
def test_what_is_no_prompt_is_refused(caller: Caller, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        caller.generate(wrong)
    assert not caller.core.prompts


def test_outside_a_loop_the_call_says_where_it_belongs() -> None:
    calls = AsyncCalls(EchoCore())
    with pytest.raises(
        InvalidRequestError, match=r"AsyncCalls.generate was called outside a running event loop.*asyncio"
    ):
        calls.generate("a")


def test_a_stream_that_is_awaited_says_how_it_is_read() -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidRequestError, match="async for"):
            await AsyncCalls(EchoCore()).generate("a")

    asyncio.run(scenario())


@pytest.mark.parametrize("several", [["a", "b"], [[1], [2]], [Chat(HELLO)], [HELLO, HELLO]])
def test_a_stream_of_several_prompts_says_which_calls_take_them(caller: Caller, several: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"list of \d prompts.*generate\(\).*complete\(\)"):
        caller.stream(several)
