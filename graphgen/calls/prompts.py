"""What a prompt may be: text, token ids, or a chat. Owns the checks of their form, for engines and clients alike.

Knows no tokenizer and no template. Used by `graphgen.calls.calls`, which makes a list of prompts of whatever is given.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from graphgen.base.plain import plain_list
from graphgen.ipc.errors import InvalidRequestError

Message = Mapping[str, Any]
"""One message of a chat: `role` and `content`, which is text or a list of parts `{"type": "text", "text": ...}`.

As in OpenAI's API it may have `name`, `tool_calls`, `tool_call_id` and `reasoning_content` as well; what the model sees
of these is its template's business.
"""
Described = Mapping[str, Any]
"""What JSON can say of a tool or a document."""


class Chat(Struct, frozen=True):
    """A prompt of messages, rendered with the model's own chat template, and what else that template is given."""

    messages: Sequence[Message]
    tools: Sequence[Described] | None = None
    """Functions that the model may call, each as OpenAI's API describes it."""
    documents: Sequence[Described] | None = None
    """What the model is to answer from, each with the keys that the template reads."""
    chat_template_kwargs: Mapping[str, str | bool | int | float | None] | None = None
    """Switches of the template, as `enable_thinking`; one that it does not know changes nothing."""

    @property
    def has_arguments(self) -> bool:
        """Whether it has more than roles and contents."""
        own = self.tools or self.documents or self.chat_template_kwargs
        return bool(own) or any(len(message) > 2 for message in self.messages)


Prompt = str | Sequence[int] | Chat | Sequence[Message]
"""Text, token ids, or a chat: a Chat or the list of its messages."""
OnePrompt = str | Sequence[int] | Chat
"""The same, when it is known which of them it is."""
Chats = Chat | Sequence[Message] | Sequence[Chat | Sequence[Message]]
"""One chat or several."""

_ROLES = "system, user, assistant or what else the model's chat template knows"
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content")
"""Of a message, beside role and content."""
MAX_DEPTH = 24
"""Lists and maps within one another, of what describes a tool."""


def batch_of(prompts: Prompt | Sequence[Prompt]) -> list[OnePrompt]:
    """A list of prompts, whether one was given or several. Its first item says what a list is.

    Arrays of numpy and torch are lists. Raises InvalidRequestError for what is no prompt.
    """
    prompts = plain_list(prompts)
    if isinstance(prompts, (str, Chat)) or not _is_list(prompts) or not _is_batch(prompts):
        return [one_prompt(prompts)]  # type: ignore[arg-type]  # the test above decides
    return [one_prompt(prompt, is_alone=False) for prompt in prompts]  # type: ignore[arg-type]  # as above


def one_prompt(prompt: Prompt, is_alone: bool = True) -> OnePrompt:
    """A prompt in the form that it has on its way: plain ints, or a Chat whose messages hold text alone.

    is_alone: it is no item of a list of prompts. Raises InvalidRequestError for what is no prompt.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Chat):
        return _checked_chat(prompt)
    items = plain_list(prompt)
    if not _is_list(items):
        raise InvalidRequestError(
            f"a prompt is of type {type(prompt).__name__}: give a str, a list of token ids, a list of messages, or a"
            " list of these"
        )
    if items and isinstance(items[0], Mapping):
        return Chat(_checked_messages(items))
    if is_alone and items and _is_batch(items):
        raise InvalidRequestError(
            f"a prompt is a list of {len(items)} prompts where one is taken: generate() of an Engine or Client"
            " and complete() of an AsyncEngine or AsyncClient take several"
        )
    return _checked_ids(items)


def chats_of(
    chats: Chats,
    tools: Sequence[Described] | None = None,
    documents: Sequence[Described] | None = None,
    chat_template_kwargs: Mapping[str, str | bool | int | float | None] | None = None,
) -> list[Chat]:
    """A list of chats, whether one was given or several, with these arguments where they have none of their own.

    Raises InvalidRequestError for what is no chat.
    """
    if not isinstance(chats, Chat) and not chats:
        raise InvalidRequestError(f"there is no chat: give a list of messages, each with role ({_ROLES}) and content")
    batch = batch_of(chats)
    for chat in batch:
        if not isinstance(chat, Chat):
            raise InvalidRequestError(
                f"a chat is {chat!r:.100}: give a list of messages, each with role ({_ROLES}) and content"
            )
    return [
        Chat(
            chat.messages,
            tools if chat.tools is None else chat.tools,
            documents if chat.documents is None else chat.documents,
            chat_template_kwargs if chat.chat_template_kwargs is None else chat.chat_template_kwargs,
        )
        for chat in batch
        if isinstance(chat, Chat)
    ]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_batch(prompts: Sequence[object]) -> bool:
    """Whether the items are prompts, and not the token ids or the messages of one. An empty list is no prompts."""
    return not prompts or isinstance(prompts[0], (str, Chat)) or _is_list(plain_list(prompts[0]))


def _checked_ids(prompt: Sequence[object]) -> list[int]:
    """The ids as plain ints. A bool is an int to Python and surely a mistake here."""
    token_ids: list[int] = []
    for token_id in prompt:
        try:
            token_ids.append(operator.index(token_id))  # type: ignore[arg-type]  # it raises TypeError
        except TypeError:
            raise _no_id(token_id) from None
        if type(token_id) is bool:
            raise _no_id(token_id)
    return token_ids


def _no_id(value: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"a prompt holds {value!r:.100} of type {type(value).__name__}: token ids are plain ints"
    )


def _checked_chat(chat: Chat) -> Chat:
    kwargs = chat.chat_template_kwargs
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidRequestError(f"chat_template_kwargs is {kwargs!r:.100}: give a dict of switches")
    for name, value in (kwargs or {}).items():
        if not isinstance(name, str) or not (value is None or isinstance(value, (str, bool, int, float))):
            raise InvalidRequestError(
                f"chat_template_kwargs has {name!r:.100}: {value!r:.100}: switches are named by text, and are text,"
                " numbers, true, false or null"
            )
    return Chat(
        _checked_messages(chat.messages),
        _described("tools", chat.tools),
        _described("documents", chat.documents),
        None if kwargs is None else dict(kwargs),
    )


def _described(name: str, given: Sequence[Described] | None) -> list[dict[str, Any]] | None:
    if given is None:
        return None
    if not _is_list(given) or not all(isinstance(one, Mapping) for one in given):
        raise InvalidRequestError(f"{name} is {given!r:.100}: give a list of dicts")
    return [_plain_json(name, one) for one in given]


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not _is_list(messages) or not messages:
        raise InvalidRequestError(f"a chat has no messages: give at least one, with role ({_ROLES}) and content")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"a chat message is {message!r:.100}: give a dict with role ({_ROLES}) and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"the role of a chat message is {role!r:.100}: give {_ROLES}")
    further = _further_keys(message)
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes, bytearray)):
        content = "\n".join(_part_text(part) for part in content)
    if content is None and ("tool_calls" in further or "reasoning_content" in further):
        content = ""
    if not isinstance(content, str):
        raise InvalidRequestError(
            f"the content of a chat message is {content!r:.100}: give text, or a list of text parts"
        )
    return {"role": role, "content": content, **further}


def _further_keys(message: Message) -> dict[str, Any]:
    """What a message has beside its role and its content; null is absent."""
    further: dict[str, Any] = {}
    for name, value in message.items():
        if name in ("role", "content") or value is None:
            continue
        if name == "tool_calls":
            further[name] = _tool_calls(value)
        elif name not in _TEXT_KEYS:
            known = ", ".join(("role", "content", "tool_calls", *_TEXT_KEYS))
            raise InvalidRequestError(f"a chat message has {name!r:.100}, which is not served: it may have {known}")
        elif isinstance(value, str):
            further[name] = value
        else:
            raise InvalidRequestError(f"{name} of a chat message is {value!r:.100}: give text")
    return further


def _tool_calls(calls: object) -> list[dict[str, Any]]:
    """The calls as templates read them, with arguments that are data; OpenAI's API writes these as text."""
    if not _is_list(calls):
        raise InvalidRequestError(f"tool_calls of a chat message is {calls!r:.100}: give a list")
    found = []
    for call in calls:  # type: ignore[attr-defined]  # a list, as was seen
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f'a tool call is {call!r:.100}: give {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}'
            )
        found.append(_plain_json("a tool call", {**call, "function": {**function, "arguments": _arguments(function)}}))
    return found


def _arguments(function: Mapping[str, Any]) -> object:
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the arguments of a tool call are {arguments!r:.100}, no JSON: {error}") from None


def _plain_json(name: str, value: Any, depth: int = 0) -> Any:  # JSON is of any type
    """A copy of plain dicts and lists. Raises InvalidRequestError for what JSON cannot say."""
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{name} has values nested more than {MAX_DEPTH} deep: make it flatter")
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain_json(name, item, depth + 1) for key, item in value.items()}
    if _is_list(value):
        return [_plain_json(name, item, depth + 1) for item in value]
    raise InvalidRequestError(
        f"{name} holds {value!r:.100}, which JSON cannot say: give text, numbers, lists and dicts"
    )


def _part_text(part: object) -> str:
    """Of a part of a message's content, as OpenAI's programs write them."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequestError(
        f'a part of a chat message is {part!r:.100}: give {{"type": "text", "text": ...}}, other parts are not served,'
        " images among them"
    )
