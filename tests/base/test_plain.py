"""numpy's numbers and arrays are taken where numbers and lists are; a bool is no number."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from graphgen import ConfigError, EngineConfig, InvalidRequestError, SamplingParams
from graphgen.calls.prompts import batch_of, one_prompt

IDS = [5, 0, 311]
INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint64]
FLOATS = [np.float16, np.float32, np.float64]


@pytest.mark.parametrize("number", INTEGERS)
def test_numpys_integers_are_integers(number: Any) -> None:
    params = SamplingParams(max_tokens=number(7), top_k=number(3), seed=number(11), n=number(2), temperature=number(1))
    assert params == SamplingParams(max_tokens=7, top_k=3, seed=11, n=2, temperature=1)
    msgspec.msgpack.encode(params)  # what is sent must hold Python's own numbers
    config = EngineConfig(max_num_seqs=number(4), num_pages=number(64), itl_target_ms=number(20))
    assert config == EngineConfig(max_num_seqs=4, num_pages=64, itl_target_ms=20)
    msgspec.msgpack.encode(config)


@pytest.mark.parametrize("number", FLOATS)
def test_numpys_floats_are_floats(number: Any) -> None:
    params = SamplingParams(temperature=number(0.5), top_p=number(0.25), deadline_ms=number(1000))
    assert params == SamplingParams(temperature=0.5, top_p=0.25, deadline_ms=1000)
    assert EngineConfig(memory_fraction=number(0.5)) == EngineConfig(memory_fraction=0.5)
    msgspec.msgpack.encode(params)
    with pytest.raises(InvalidRequestError, match=r"max_tokens is 7\.5"):
        SamplingParams(max_tokens=number(7.5))


@pytest.mark.parametrize(
    "prompt",
    [tuple(IDS), [np.int64(i) for i in IDS], np.array(IDS), np.array(IDS, np.uint16), torch.tensor(IDS)],
    ids=["tuple", "numbers", "array", "narrow array", "tensor"],
)
def test_token_ids_may_come_from_numpy(prompt: Any) -> None:
    (ids,) = batch_of(prompt)
    assert ids == IDS
    assert {type(token_id) for token_id in ids} == {int}
    assert one_prompt(prompt) == IDS


def test_stop_token_ids_may_come_from_numpy() -> None:
    for stop in ([np.int64(9), 3], (np.uint8(9), np.int32(3)), np.array([9, 3]), torch.tensor([9, 3])):
        params = SamplingParams(stop_token_ids=stop)  # type: ignore[arg-type]  # what types alone would refuse
        assert params.resolve_stop_token_ids((2,)) == (2, 9, 3)
        msgspec.msgpack.encode(params)


def test_a_table_of_ids_is_a_list_of_prompts() -> None:
    for table in (np.array([IDS, IDS]), torch.tensor([IDS, IDS]), [np.array(IDS), torch.tensor(IDS)]):
        assert batch_of(table) == [IDS, IDS]  # type: ignore[arg-type]  # what types alone would refuse


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, np.float32(1), "1", None])
def test_what_is_no_integer_is_no_token_id(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"of type {type(value).__name__}: token ids are plain ints"):
        batch_of([3, value])


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_a_bool_is_no_number(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens is"):
        SamplingParams(max_tokens=value)
    with pytest.raises(InvalidRequestError, match="temperature is"):
        SamplingParams(temperature=value)
    with pytest.raises(InvalidRequestError, match="stop_token_ids is"):
        SamplingParams(stop_token_ids=[value])
    with pytest.raises(ConfigError, match="num_pages is"):
        EngineConfig(num_pages=value)


@pytest.mark.parametrize("prompt", [b"ab", bytearray(b"ab"), {1, 2}, 5, np.int64(5), np.array(5), np.zeros(2)])
def test_what_is_no_list_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"a prompt (is of type|holds .* of type) "):
        batch_of(prompt)
