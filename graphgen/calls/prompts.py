"""What a prompt may be: text, token ids, or a chat. Owns the checks of their form, for engines and clients alike.

Knows no tokenizer and no template. Used by `graphgen.calls.calls`, which makes a list of prompts of whatever is given.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from graphgen.base.plain import plain_list
from graphgen.ipc.errors import InvalidRequestError

Message = Mapping[str, Any]
"""One message of a chat: `role` and `content`, which is text or a list of parts `{"type": "text", "text": ...}`."""


class Chat(Struct, frozen=True):
    """A prompt of messages, rendered with the model's own chat template."""

    messages: Sequence[Message]


Prompt = str | Sequence[int] | Chat | Sequence[Message]
"""Text, token ids, or a chat: a Chat or the list of its messages."""
OnePrompt = str | Sequence[int] | Chat
"""The same, when it is known which of them it is."""
Chats = Chat | Sequence[Message] | Sequence[Chat | Sequence[Message]]
"""One chat or several."""

_ROLES = "system, user, assistant or what else the model's chat template knows"


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
        return Chat(_checked_messages(prompt.messages))
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


def chats_of(chats: Chats) -> list[Chat]:
    """A list of chats, whether one was given or several. Raises InvalidRequestError for what is no chat."""
    if not isinstance(chats, Chat) and not chats:
        raise InvalidRequestError(f"there is no chat: give a list of messages, each with role ({_ROLES}) and content")
    batch = batch_of(chats)
    for chat in batch:
        if not isinstance(chat, Chat):
            raise InvalidRequestError(
                f"a chat is {chat!r:.100}: give a list of messages, each with role ({_ROLES}) and content"
            )
    return [chat for chat in batch if isinstance(chat, Chat)]


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


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    if not _is_list(messages) or not messages:
        raise InvalidRequestError(f"a chat has no messages: give at least one, with role ({_ROLES}) and content")
    return [_checked_message(message) for message in messages]


def _checked_message(message: Message) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"a chat message is {message!r:.100}: give a dict with role ({_ROLES}) and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"the role of a chat message is {role!r:.100}: give {_ROLES}")
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            raise InvalidRequestError(f"a chat message has {name!r}, which is not served: give role and content alone")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes, bytearray)):
        content = "\n".join(_part_text(part) for part in content)
    if not isinstance(content, str):
        raise InvalidRequestError(
            f"the content of a chat message is {content!r:.100}: give text, or a list of text parts"
        )
    return {"role": role, "content": content}


def _part_text(part: object) -> str:
    """Of a part of a message's content, as OpenAI's programs write them."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequestError(
        f'a part of a chat message is {part!r:.100}: give {{"type": "text", "text": ...}}, other parts are not served'
    )
