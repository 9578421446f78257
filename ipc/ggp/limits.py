"""Limits of GGP/1 that no server exceeds. A server may allow less; it says in `welcome` what it allows.

Used by the message types, which enforce them while they decode, before the values are built.
"""

MAX_INT = 2**53 - 1
"""Integers beyond it lose digits in languages whose numbers are doubles."""

MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_PROMPT_TOKENS = 1 << 20
MAX_MESSAGES = 1024
"""Messages of one chat prompt."""
MAX_ROLE_LEN = 64
MAX_TOOLS = 128
"""Tools, documents, and tool calls of a message, each."""
MAX_SWITCHES = 32
"""Of `chat_template_kwargs`."""
MAX_SWITCH_LEN = 1024
"""Characters of the text of one."""
MAX_CLIENT_LEN = 256
MAX_SESSION_LEN = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LEN = 1024
MAX_STOP_TOKEN_IDS = 16
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
"""Likeliest tokens whose log-probabilities are told."""
MAX_LOGPROB_ITEMS = 1 << 19
"""Log-probabilities in one message, which a frame holds: of a prompt, or of an output that comes in one `delta`."""
MAX_SAMPLES = 16
MAX_MARKED_IDS = 256
"""Token ids whose places in the text a request asks for."""
MAX_TAIL_LEN = 4096
"""Characters of the end of a rendered chat."""
MAX_PRIORITY = 9
MAX_DURATION_MS = 3_600_000
MAX_CACHE_SALT_LEN = 256
MAX_GRAMMAR_LEN = 1 << 17
"""Characters of a schema, an expression or a grammar, or of all options of a choice."""
MAX_CHOICES = 1000
MAX_AFTER_LEN = 256
"""Characters of the text behind which a structure begins."""
MAX_TENANT_LEN = 256
MAX_ENDPOINTS = 64
"""Of a gateway's report: pairs of path and status."""
MAX_ENDPOINT_LEN = 64
MAX_LOG_ID_LEN = 128
