"""A model's chat template: a chat becomes the text that the model was trained on.

Owns the Jinja environment, which is the one of transformers' `apply_chat_template` (extensions, filters, globals and
variables), without importing transformers. Knows no tokens. Used by `graphgen.requests.tokenizer`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec import Struct

from graphgen.ipc.errors import InvalidRequestError

if TYPE_CHECKING:
    from jinja2 import Template

_ARGUMENTS = ("messages", "tools", "documents")
_OTHER_TEMPLATE = "give the prompt as text or token ids, mend the template, or name another with chat_template="


class ChatSource(Struct, frozen=True):
    """The text of a template, and where it was read: `chat_template.jinja in /models/x`."""

    text: str
    origin: str
    fault: str = ""
    """Why there is no text: a file that cannot be read, settings that are no template."""


class ChatTemplate:
    """Renders chats. Safe to use from several threads.

    A template that does not parse costs chat and nothing else: it has a `fault`, which `render` raises.
    """

    def __init__(self, source: ChatSource, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: as templates name them, `bos_token` and so on."""
        self._origin = source.origin
        self._special_tokens = dict(special_tokens)
        self._template, self._variables, self.fault = _compile(source)
        self._reserved = {*_ARGUMENTS, "add_generation_prompt", *special_tokens}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the chat, ready for the model's turn.

        chat_template_kwargs: switches of the template; those that it does not read are left out.
        Raises InvalidRequestError when the template refuses the chat, fails on it, or does not parse, and for tools or
        documents that it would not read.
        """
        if self._template is None:
            raise InvalidRequestError(self.fault)
        for name, given in (("tools", tools), ("documents", documents)):
            if given and name not in self._variables:
                raise InvalidRequestError(
                    f"the chat template ({self._origin}) does not read {name}: leave them out, or name another template"
                    " with chat_template="
                )
        switches = self._switches(chat_template_kwargs or {})
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools or None,
                documents=documents or None,
                add_generation_prompt=True,
                **self._special_tokens,
                **switches,
            )
        except _RefusalError as error:
            raise InvalidRequestError(
                f"the chat template ({self._origin}) refuses these messages: {error} (their roles: {_roles(messages)})"
            ) from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise InvalidRequestError(
                f"the chat template ({self._origin}) fails with {type(error).__name__}: {error}; {_OTHER_TEMPLATE}"
            ) from None

    def _switches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        taken = sorted(self._reserved & set(given))
        if taken:
            raise InvalidRequestError(f"chat_template_kwargs has {', '.join(taken)}, which no request may set")
        return {name: value for name, value in given.items() if name in self._variables}


def _compile(source: ChatSource) -> "tuple[Template | None, frozenset[str], str]":
    """(the template, the variables that it reads, ""), or what is wrong with it."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    reason = source.fault
    try:
        if not reason:
            environment = _environment()
            variables = find_undeclared_variables(environment.parse(source.text)) - set(environment.globals)
            return environment.from_string(source.text), frozenset(variables), ""
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    return None, frozenset(), f"the chat template ({source.origin}) cannot be read ({reason}): {_OTHER_TEMPLATE}"


def _environment() -> Any:  # of jinja2, whose import waits until a template is there
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock, Node
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the model says, for training. The text is what is inside."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    class SafeNamespace(Namespace):
        """Refuses the names by which a template could leave the sandbox."""

        def __init__(*args: Any, **values: Any) -> None:  # a value may be named self
            own, *rest = args
            for name in dict(*rest, **values):
                _check_name(name)
            Namespace.__init__(own, *rest, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace of a template cannot hold {name!r}: names begin with no underscore")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _MakeDict()
    environment.globals["namespace"] = SafeNamespace
    return environment


class _RefusalError(Exception):
    """What a template says by `raise_exception`."""


class _MakeDict:
    """`dict` for templates: what it makes and nothing of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: object) -> NoReturn:
    raise _RefusalError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _roles(messages: Sequence[Mapping[str, str]]) -> str:
    shown = [str(message.get("role")) for message in messages]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-3:]])
