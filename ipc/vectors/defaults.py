"""The names of the kinds and the default of every field that has one, as PROTOCOL.md's tables say them.

Written by hand, like the vectors, so that they and the types of the codec are checked against each other. Read by
make.py, which writes them to `defaults.json`.
"""

from graphgen.ipc.vectors.wire import Value

KINDS = {
    "H": "hello",
    "G": "generate",
    "X": "cancel",
    "S": "stats_request",
    "R": "report",
    "L": "health_request",
    "B": "bye",
    "P": "ping",
    "Q": "pong",
    "W": "welcome",
    "A": "accepted",
    "D": "delta",
    "F": "done",
    "E": "error",
    "N": "draining",
    "I": "notice",
    "U": "deltas",
    "T": "stats",
    "M": "health",
}

SAMPLING: dict[str, Value] = {
    "max_tokens": 128,
    "min_tokens": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "skip_special_tokens": True,
    "n": 1,
    "priority": 0,
    "deadline_ms": None,
    "itl_target_ms": None,
    "ttft_target_ms": None,
    "tpot_target_ms": None,
    "cache_salt": "",
    "structured": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "model_defaults": False,
}

LOGPROBS: dict[str, Value] = {"top": 0, "values": {"bin": ""}, "tokens": [], "ids": [], "before": {"bin": ""}}

DEFAULTS: dict[str, dict[str, Value]] = {
    "hello": {"versions": [1, 1], "client": "", "notices": False, "batches": False},
    "generate": {
        "text": None,
        "messages": None,
        "prompt_ids": None,
        "prompt_u32": None,
        "tools": None,
        "documents": None,
        "chat_template_kwargs": None,
        "tenant": "",
        "log_id": "",
        "sampling": {},
        "stream": True,
        "echo_ids": False,
        "echo_text": False,
        "special_tokens": True,
        "prompt_only": False,
        "marked_ids": [],
        "tail_len": 0,
    },
    "chat_message": {"name": None, "tool_calls": None, "tool_call_id": None, "reasoning_content": None},
    "sampling": SAMPLING,
    "structured": {"text": "", "options": [], "after": ""},
    "cancel": {"session": ""},
    "stats_request": {"metrics": False, "live_after": None},
    "ping": {"t": 0, "instance": ""},
    "pong": {"t": 0, "instance": ""},
    "limits": {
        "messages": 1024,
        "samples": 16,
        "stop_strings": 16,
        "stop_string_len": 1024,
        "stop_token_ids": 16,
        "deadline_ms": 3_600_000,
    },
    "welcome": {"sampling_defaults": {}, "draining": False},
    "sampling_defaults": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
    "accepted": {"prompt_ids": None, "prompt_text": None, "tail": ""},
    "delta": {
        "seq": 0,
        "sample": 0,
        "ids": [],
        "text": "",
        "finish": None,
        "cached_tokens": 0,
        "marks": [],
        "logprobs": None,
        "prompt_logprobs": None,
    },
    "logprobs": LOGPROBS,
    "stats": {
        "worker_restarts": 0,
        "worker_loss": "",
        "poisoned": 0,
        "numerical_errors": 0,
        "metrics": None,
        "live": None,
    },
    "usage": {"cached_tokens": 0},
    "error": {"retryable": False, "retry_after_ms": None, "id": None, "about": "", "versions": None},
}
"""Name of a kind, or of a map within one -> its defaults; `sampling`, `limits`, `sampling_defaults`, `usage` and each
of `messages` (`chat_message`) have their own."""
