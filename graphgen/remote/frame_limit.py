"""What a server's limit of a frame means for a request. Pure. Used by `graphgen.remote.data_socket`."""

import msgspec

from graphgen.ipc.errors import GraphgenError, InvalidRequestError, PromptTooLongError
from graphgen.ipc.ggp.messages import Generate, ServerLimits

ID_BYTES = 4
"""Of a token id in `prompt_u32`."""


def refusal(message: Generate, num_bytes: int, limits: ServerLimits) -> GraphgenError | None:
    """Why a request whose map has so many bytes cannot be sent; None where it can."""
    if num_bytes <= limits.frame_bytes:
        return None
    num_tokens, text_bytes = _num_tokens(message), _text_bytes(message)
    if num_tokens > limits.prompt_tokens:
        return PromptTooLongError(
            f"the prompt has {num_tokens} tokens, the context of prompt and output {limits.prompt_tokens}: shorten it"
        )
    if text_bytes > limits.text_bytes:
        return PromptTooLongError(
            f"the prompt has {text_bytes} bytes of text, the limit is {limits.text_bytes}: shorten it"
        )
    return InvalidRequestError(
        f"the request takes {num_bytes} bytes with all that belongs to it, the server's limit is {limits.frame_bytes}:"
        " shorten its prompt, its tools or the structure that its output must follow"
    )


def _num_tokens(message: Generate) -> int:
    """That are given as ids."""
    return len(message.prompt_u32 or b"") // ID_BYTES + len(message.prompt_ids or ())


def _text_bytes(message: Generate) -> int:
    if message.text is not None:
        return len(message.text.encode())
    chat = (message.messages, message.tools, message.documents, message.chat_template_kwargs)
    return 0 if message.messages is None else len(msgspec.msgpack.encode(chat))
