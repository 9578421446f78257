"""The few words that a family's template is written in: what the config decides, and which layer is of which kind.

Owns those words and the view of a config that they read. Never reads a file and knows no family. Called by the
families' own modules; reader.py fills the templates in.

A word is typed Any: what stands there once a config was read has the type of the field, and load_spec checks it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from msgspec import Struct

from graphgen.ipc.errors import UnsupportedModelError


class Config:
    """The values of a config by the names that transformers gives them, and which of them were asked for.

    `values` is a transformers config object, or one with the same attributes (untyped there, hence Any).
    """

    def __init__(self, values: Any, aliases: Mapping[str, str] = MappingProxyType({})) -> None:
        """aliases: common names -> those that this family's configs use."""
        self._values = values
        self._aliases = aliases
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """None where the config has no such key, or null."""
        name = self._aliases.get(name, name)
        self.read.add(name)
        return getattr(self._values, name, None)

    def within(self, name: str) -> "Config":
        """What stands in the dictionary, or config object, of that name; nothing where there is none."""
        inner = self.get(name) or {}
        return Config(SimpleNamespace(**inner) if isinstance(inner, Mapping) else inner)

    def need(self, name: str) -> Any:
        """Raises AttributeError where the config has no such key, or null."""
        if (value := self.get(name)) is None:
            raise AttributeError(f"{self._aliases.get(name, name)} is missing")
        return value


def value_at(values: Any, path: str) -> Any:
    """Of a key, or with dots of one in the dictionary, or config object, of another; None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return values


# --- words of a template ---------------------------------------------------------------------------------------


class Key(Struct, frozen=True):
    """A value that the config decides."""

    name: str
    fallback: Any
    read: Callable[[Any], Any] | None

    def value_in(self, config: Config) -> Any:
        if (value := config.get(self.name)) is None:
            return filled(self.fallback, config)
        return value if self.read is None else self.read(value)


class Computed(Struct, frozen=True):
    """A value that follows from several of the config's."""

    of: Callable[[Config], Any]

    def value_in(self, config: Config) -> Any:
        return self.of(config)


class _Required:
    """No fallback: a config without the key is refused."""

    def value_in(self, config: Config) -> Any:
        raise AssertionError("the key says what is missing")


REQUIRED = _Required()


def key(name: str, fallback: Any = REQUIRED, read: Callable[[Any], Any] | None = None) -> Any:
    """The config's value of that name; `fallback`, which may be another word, where it has none. read: from the value
    as it stands there to the field's."""
    if fallback is REQUIRED:
        needed = Computed(lambda config: config.need(name))
        return needed if read is None else Computed(lambda config: read(config.need(name)))
    return Key(name, fallback, read)


def flag(name: str, fallback: bool = False) -> Any:
    """A key that is true or false. A word, as "false", would be true: it is refused."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected true or false")
        return value

    return Key(name, fallback, read)


def filled(word: Any, config: Config) -> Any:
    """A template with the config's values in place of its words."""
    if isinstance(word, (Key, Computed, Within)):
        return word.value_in(config)
    if isinstance(word, Struct):
        values = {name: filled(getattr(word, name), config) for name in word.__struct_fields__}
        return type(word)(**values)
    if isinstance(word, tuple):
        return tuple(filled(item, config) for item in word)
    return word


def unless(name: str, value: Any) -> Any:
    """`value` where the config has the key and it is off; None otherwise."""
    return Computed(lambda config: value if config.get(name) is False else None)


def none_if(name: str, word: Any) -> Any:
    """A word; None where the key is on."""
    return Computed(lambda config: None if config.get(name) else filled(word, config))


def only_if(name: str, word: Any) -> Any:
    """A word; None where the key is off."""
    return Computed(lambda config: filled(word, config) if config.get(name) else None)


def choose(name: str, on: Any, off: Any) -> Any:
    """One of two values, by whether the key is on."""
    return Computed(lambda config: on if config.get(name) else off)


def inverse(value: float) -> float:
    """For `key`: of a divisor that is a factor here."""
    return 1.0 / value


def product(*names: str) -> Any:
    """Of several keys."""
    return Computed(lambda config: math.prod(config.need(name) for name in names))


def four_times(name: str) -> Any:
    """Of a feed-forward whose size the config leaves out."""
    return Computed(lambda config: 4 * config.need(name))


OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values under which a key changes nothing. They differ by key, hence Any."""

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "xielu": "xielu",
}
"""Hugging Face's name of an activation -> ours, a key of activations.ACTIVATIONS."""


def activation(name: str = "hidden_act", meant: Mapping[str, str] = MappingProxyType({})) -> Any:
    """The activation that the config names. meant: names that mean another here."""

    def read(value: Any) -> str:
        value = meant.get(value, value)
        if value not in ACTIVATIONS:
            raise UnsupportedModelError(f"config.json has {name} {value!r}, supported are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    return key(name, read=read)


def to_power(name: str, exponent: float) -> Any:
    """The key's number to a power."""
    return Computed(lambda config: float(config.need(name) ** exponent))


class Within(Struct, frozen=True):
    """A word about the dictionary, or config object, that a key has."""

    name: str
    word: Any

    def value_in(self, config: Config) -> Any:
        return filled(self.word, config.within(self.name))


def within(name: str, word: Any) -> Any:
    """See Within."""
    return Within(name, word)


def head_dim() -> Any:
    """The config's head_dim; the share of a head of the hidden size where it has none."""

    def size(config: Config) -> int:
        found: int | None = config.get("head_dim")
        quotient: int = config.need("hidden_size") // config.need("num_attention_heads")
        return found or quotient

    return Computed(size)


def window(switch: str | None = None) -> Any:
    """The config's sliding_window; none where the key `switch` is there and off."""

    def size(config: Config) -> int | None:
        found: int | None = config.get("sliding_window")
        return found if switch is None or config.get(switch) is not False else None

    return Computed(size)


# --- which layer is of which kind ------------------------------------------------------------------------------

Kinds = Callable[[Config, int], Sequence[str]]
"""(config, number of layers) -> the kind of each layer, a key of Family.mixers or Family.feed_forwards."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Hugging Face's names of attention without and with a window."""


def uniform(window: str | None = None) -> Kinds:
    """All layers are of one kind: SLIDING where the config has a value for the key `window`."""

    def kinds(config: Config, num_layers: int) -> list[str]:
        kind = FULL if window is None or config.get(window) is None else SLIDING
        listed = config.get("layer_types") or [kind] * num_layers
        if set(listed) != {kind} and set(listed) <= {FULL, SLIDING}:
            raise UnsupportedModelError(
                f"config.json has layer_types that differ by layer, but all layers of this family are of {kind}:"
                " correct layer_types, or name the architecture that reads them"
            )
        return list(listed)

    return kinds


def listed(name: str = "layer_types", otherwise: Kinds | None = None) -> Kinds:
    """The config lists the kinds; `otherwise` says them for one that has no list, as older files."""

    def kinds(config: Config, num_layers: int) -> Sequence[str]:
        derived = [FULL] * num_layers if otherwise is None else otherwise(config, num_layers)  # reads its keys
        return config.get(name) or derived

    return kinds


def every(period: str | int, kind: str, others: str) -> Kinds:
    """Layers number period - 1, 2 * period - 1, ... are of `kind`. period: a number, or the key that has it."""

    def kinds(config: Config, num_layers: int) -> list[str]:
        count = config.get(period) if isinstance(period, str) else period
        count = len(count) if isinstance(count, str) else count or 1  # "LLLG" is one of four, 0 all
        return [kind if (number + 1) % count == 0 else others for number in range(num_layers)]

    return kinds


def repeated(name: str, otherwise: Sequence[Any]) -> Kinds:
    """The config lists pairs: the kinds of some layers, and how often these come."""

    def kinds(config: Config, num_layers: int) -> list[str]:
        pairs = config.get(name) or otherwise  # of too many layers, enough for the reader to see it
        return [kind for part, count in pairs for kind in list(part) * min(count, num_layers + 1)]

    return kinds


def from_layer(first: str | int, kind: str, others: str, switch: str | None = None) -> Kinds:
    """Layers from number `first`, or the number that the key of that name has, are of `kind`; none where the key
    `switch` is off."""

    def kinds(config: Config, num_layers: int) -> list[str]:
        count = config.get(first) if isinstance(first, str) else first  # is read, though it may not count
        if switch is not None and not config.get(switch):
            count = num_layers
        elif isinstance(first, str):
            count = config.need(first)
        return [kind if number >= count else others for number in range(num_layers)]

    return kinds


def except_listed(name: str, kind: str, others: Kinds) -> Kinds:
    """Layers whose numbers the config lists are of `kind`, the rest as `others` says."""

    def kinds(config: Config, num_layers: int) -> list[str]:
        numbers: Sequence[int] = config.get(name) or ()
        rest = others(config, num_layers)
        return [kind if number in numbers else rest[number] for number in range(num_layers)]

    return kinds


def from_flags(name: str, on: str, off: str, otherwise: Kinds) -> Kinds:
    """The config lists 1 for a layer of kind `on`, 0 for one of kind `off`."""

    def kinds(config: Config, num_layers: int) -> Sequence[str]:
        derived, flags = otherwise(config, num_layers), config.get(name)
        return [on if flag else off for flag in flags[:num_layers]] if flags else derived

    return kinds
