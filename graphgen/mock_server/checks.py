"""What a request is refused for, behind what its types refuse: the checks that need the server's limits.

Owns the rules and the order in which they are looked at. Never sends. Called by server.py for each `generate`.
"""

from collections.abc import Sequence

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.ggp.framing import make_error
from graphgen.ipc.ggp.messages import OF_CHATS, Error, Generate, Welcome

EOS_ID = 256
"""Tokens are the 256 bytes, and the end of a sequence behind them."""
VOCAB_SIZE = EOS_ID + 1


class Refusal(Exception):
    """A request that is not taken, with the error that answers it."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


def prompt_ids(request: Generate, welcome: Welcome) -> list[int]:
    """The prompt's tokens: bytes of UTF-8, whichever way it was given. Raises Refusal."""
    given = [
        name
        for name in ("text", "messages", "prompt_ids", "prompt_u32")
        if getattr(request, name) is not None  # the four are fields of one type
    ]
    if len(given) != 1:
        raise _refusal(request, f"prompts given: {', '.join(given) or 'none'}: give exactly one")
    further = [name for name in OF_CHATS if getattr(request, name) is not None]
    if further and request.messages is None:
        raise _refusal(request, f"{' and '.join(further)} belong to a chat: give messages, or leave them out")
    _check_sampling(request)
    ids = _ids(request, welcome)
    context = welcome.limits.prompt_tokens
    if len(ids) >= context:
        message = f"prompt has {len(ids)} tokens, the context is {context}: leave room for one token of output"
        raise Refusal(make_error("never_fits", message, request.id, "generate"))
    return ids


def prompt_text(request: Generate, ids: Sequence[int]) -> str:
    """What an echo repeats and a script looks for."""
    if request.messages is not None:
        return request.messages[-1].content
    return bytes(token for token in ids if token < EOS_ID).decode(errors="replace")


def _ids(request: Generate, welcome: Welcome) -> list[int]:
    if request.prompt_ids is not None or request.prompt_u32 is not None:
        return _given_ids(request)
    parts = [request.text or ""] if request.messages is None else [part.content for part in request.messages]
    data = "\n".join(parts).encode()
    if len(data) > welcome.limits.text_bytes:
        message = f"text has {len(data)} bytes, the limit is {welcome.limits.text_bytes}: shorten it"
        raise Refusal(make_error("too_large", message, request.id, "generate"))
    if not data:
        raise _refusal(request, "the prompt is empty: give at least one token")
    return list(data)


def _given_ids(request: Generate) -> list[int]:
    ids = request.prompt_ids
    if request.prompt_u32 is not None:
        if len(request.prompt_u32) % 4:
            raise _refusal(request, f"prompt_u32 has {len(request.prompt_u32)} bytes: send 4 for each token")
        # Read as signed: an id of 2^31 or more is then negative, and refused with those beyond the vocabulary.
        ids = unpack_int32(request.prompt_u32).tolist()
    assert ids is not None
    for token in ids:
        if not 0 <= token < VOCAB_SIZE:
            raise _refusal(request, f"token id {token % 2**32} is not below the vocabulary's {VOCAB_SIZE}")
    return ids


def _check_sampling(request: Generate) -> None:
    sampling = request.sampling
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise _refusal(request, f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}: lower it")
    biased = [token for token, _ in sampling.logit_bias or []]
    if len(set(biased)) < len(biased):
        raise _refusal(request, "logit_bias has a token twice: give one bias of a token")
    if biased and max(biased) >= VOCAB_SIZE:
        raise _refusal(request, f"logit_bias has token {max(biased)}, which is not below {VOCAB_SIZE}")
    for token in sampling.stop_token_ids:
        if token >= VOCAB_SIZE:
            raise _refusal(request, f"stop token id {token} is not below the vocabulary's {VOCAB_SIZE}")


def _refusal(request: Generate, message: str) -> Refusal:
    return Refusal(make_error("bad_request", message, request.id, "generate"))
