"""The token ids on which a model's outputs end, as its configs name them.

Owns the checks of them. Called by reader.py.
"""

import logging

from graphgen.ipc.errors import UnsupportedModelError
from graphgen.ipc.worker_messages import MAX_STOP_TOKEN_IDS
from graphgen.models.families.words import Config

logger = logging.getLogger("graphgen.models")


def eos_token_ids(config: Config, generation_eos: int | list[int] | None, where: str) -> tuple[int, ...]:
    listed = _token_ids(config.get("eos_token_id") if generation_eos is None else generation_eos, where)
    return _known_ids(listed, config.need("vocab_size"), where)


def _token_ids(ids: object, where: str) -> tuple[int, ...]:
    """The ids of an eos_token_id as it stands in a file, each once."""
    if ids is None:
        return ()
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(token_id) is int for token_id in listed):
        raise UnsupportedModelError(
            f"the eos_token_id of {where} is {ids!r}: give a token id or a list of them in generation_config.json,"
            " or in config.json where that file has none"
        )
    return tuple(dict.fromkeys(listed))


def _known_ids(token_ids: tuple[int, ...], vocab_size: int, where: str) -> tuple[int, ...]:
    """Those of the ids that the model can draw. Configs often keep the ids of the model they were made from."""
    known = tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)
    if known != token_ids:
        logger.warning(
            "%s: of the end-of-sequence ids %s of its configs, those outside the vocabulary, 0 to %d, are ignored",
            *(where, ", ".join(map(str, token_ids)), vocab_size - 1),
        )
    if len(known) >= MAX_STOP_TOKEN_IDS:  # the tokenizer may have one more
        raise UnsupportedModelError(
            f"{where} ends on {len(known)} token ids, the limit is {MAX_STOP_TOKEN_IDS - 1}: shorten eos_token_id in"
            " generation_config.json"
        )
    return known
