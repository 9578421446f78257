"""SamplingParams refuses at once what cannot be served, and says the value, the limit and the remedy."""

import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest

from graphgen import InvalidRequestError, SamplingParams
from graphgen.calls.sampling_params import MAX_STOP_STRING_LEN, MAX_STOP_STRINGS
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.worker_messages import MAX_STOP_TOKEN_IDS, SamplerParams

PLAIN = SamplingDefaults()
BAD: list[tuple[str, Any]] = [  # Any: wrong types are the point
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", True),
    ("max_tokens", 1.5),
    ("max_tokens", "8"),
    ("max_tokens", 2**40),
    ("min_tokens", -1),
    ("min_tokens", 129),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_k", -2),
    ("top_k", 1.0),
    ("top_k", True),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", math.nan),
    ("presence_penalty", -math.inf),
    ("frequency_penalty", math.inf),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", True),
    ("seed", 1.0),
    ("stop", 3),
    ("stop", ("",)),
    ("stop", ""),
    ("stop", ("a", 1)),
    ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
    ("stop", "x" * (MAX_STOP_STRING_LEN + 1)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", (True,)),
    ("stop_token_ids", 5),
    ("stop_token_ids", tuple(range(MAX_STOP_TOKEN_IDS + 1))),
    ("ignore_eos", 1),
    ("skip_special_tokens", "no"),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", 1.0),
    ("logit_bias", {5: 100.5}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: "1"}),
    ("logit_bias", [[5, 1.0]]),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=name.split("_")[0]) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("max_tokens", None),
        ("min_tokens", 128),
        ("temperature", 0),
        ("temperature", None),
        ("top_k", -1),
        ("top_p", 1),
        ("top_p", 1e-6),
        ("min_p", 1.0),
        ("seed", 2**63 - 1),
        ("seed", 0),
        ("stop", "x" * MAX_STOP_STRING_LEN),
        ("stop", ["a"] * MAX_STOP_STRINGS),
        ("stop_token_ids", list(range(MAX_STOP_TOKEN_IDS))),
        ("presence_penalty", -2.0),
        ("n", 16),
        ("priority", 9),
        ("priority", 0),
        ("deadline_ms", 1),
        ("deadline_ms", 1e9),
        ("itl_target_ms", 0.5),
        ("ttft_target_ms", None),
        ("tpot_target_ms", None),
        ("cache_salt", "x" * 256),
        ("logit_bias", dict.fromkeys(range(1024), -100)),
    ],
)
def test_values_at_their_limits_are_taken(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_the_sampler_gets_floats_and_the_drawn_seed_only_if_none_was_stated() -> None:
    assert SamplingParams(temperature=0, top_k=3).resolve_sampler(PLAIN, seed=9) == SamplerParams(top_k=3, seed=9)
    assert type(SamplingParams(temperature=0).resolve_sampler(PLAIN, seed=9).temperature) is float
    assert SamplingParams(seed=4).resolve_sampler(PLAIN, seed=9).seed == 4


def test_biases_are_packed_by_rising_token_without_those_that_change_nothing() -> None:
    given: Any = {9: np.float32(0.5), np.int64(3): -100, 4: 0.0}
    sampling = SamplingParams(logit_bias=given)
    given[9] = 7  # too late
    assert sampling.logit_bias == {9: 0.5, 3: -100, 4: 0.0}
    packed = sampling.resolve_sampler(PLAIN, seed=9).biases
    assert struct.unpack("<iiff", packed) == (3, 9, -100.0, 0.5)


def test_the_samples_of_a_prompt_have_seeds_of_their_own() -> None:
    assert [SamplingParams(seed=4).resolve_sampler(PLAIN, 9, index).seed for index in range(3)] == [4, 5, 6]
    assert [SamplingParams().resolve_sampler(PLAIN, 9, index).seed for index in range(3)] == [9, 10, 11]
    assert SamplingParams(seed=2**63 - 1).resolve_sampler(PLAIN, 9, 1).seed == 0


def test_stop_ids_are_the_models_and_the_requests_each_once() -> None:
    assert SamplingParams(stop_token_ids=[7, 2, 7]).resolve_stop_token_ids((1, 2)) == (1, 2, 7)
    assert SamplingParams(stop_token_ids=[7], ignore_eos=True).resolve_stop_token_ids((1, 2)) == (7,)


def test_stop_ids_that_fit_alone_may_be_too_many_with_the_models() -> None:
    sampling = SamplingParams(stop_token_ids=tuple(range(10, 10 + MAX_STOP_TOKEN_IDS)))
    with pytest.raises(InvalidRequestError, match="the limit is 16"):
        sampling.resolve_stop_token_ids((1,))
    assert (
        len(SamplingParams(stop_token_ids=sampling.stop_token_ids, ignore_eos=True).resolve_stop_token_ids((1,))) == 16
    )


def test_one_stop_string_and_a_list_of_one_are_the_same() -> None:
    assert SamplingParams(stop="END").stop_strings == SamplingParams(stop=["END"]).stop_strings == ("END",)


def test_making_one_evaluates_no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """That took two thirds of the time, and each time made a name that Python's table of names grew by."""
    monkeypatch.setattr(msgspec.structs, "fields", lambda _: pytest.fail("the fields were looked up"))
    assert SamplingParams(max_tokens=3).max_tokens == 3
