"""What a parser says of an output, in its order."""

from collections.abc import Sequence

from msgspec import Struct


class Content(Struct, frozen=True):
    """Text for the reader."""

    text: str


class Reasoning(Struct, frozen=True):
    """Text of what the model thought."""

    text: str


class Call(Struct, frozen=True):
    """A call of a function begins."""

    name: str


class Arguments(Struct, frozen=True):
    """More of the arguments of the newest call: a part of their JSON."""

    text: str


Event = Content | Reasoning | Call | Arguments


def joined(events: Sequence[Event]) -> list[Event]:
    """Texts of one kind that follow one another as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Call) or isinstance(last, Call) or last is None or type(last) is not type(event):
            found.append(event)
        else:
            found[-1] = type(event)(last.text + event.text)
    return found
