"""A modest client beside one that is greedy in every way the protocol allows: see `tests.frontend.greedy`."""

from pathlib import Path

import pytest

from tests.frontend.greedy import compare, greedy_server

MORE, LESS = 1.25, 0.75
"""Within a quarter."""


@pytest.mark.alone
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_modest_client_gets_its_half_whatever_another_asks_for(tmp_path: Path, replicas: int) -> None:
    with greedy_server(tmp_path, "--replicas", str(replicas), paced=True) as (address, step_log):
        alone, beside, in_flight_s = compare(address, step_log, 8.0)
    # When it comes the steps in flight are the other's alone.
    assert beside.first_token_s <= MORE * 2 * alone.first_token_s + in_flight_s
    assert beside.tokens_per_s >= LESS * alone.tokens_per_s / 2
