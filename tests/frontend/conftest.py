"""Frontends for tests: each test has its own, over one tokenizer."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graphgen.requests.tokenizer import Tokenizer
from tests.frontend.harness import Frontend, demo_tokenizer

MakeFrontend = Callable[..., Frontend]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return demo_tokenizer(chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}model:")


@pytest.fixture
def make_frontend(tokenizer: Tokenizer) -> Iterator[MakeFrontend]:
    made: list[Frontend] = []

    def make(**settings: Any) -> Frontend:
        made.append(Frontend(**{"tokenizer": tokenizer, **settings}))
        return made[-1]

    yield make
    for frontend in made:
        frontend.close()


@pytest.fixture
def frontend(make_frontend: MakeFrontend) -> Frontend:
    return make_frontend()
