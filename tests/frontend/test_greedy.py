"""A modest client beside one that is greedy in every way the protocol allows: see `tests.frontend.greedy`."""

from pathlib import Path

import pytest

from tests.frontend.greedy import compare
from tests.serving import serving

MORE, LESS = 1.25, 0.75
"""Within a quarter."""


@pytest.mark.alone
def test_a_modest_client_gets_its_half_whatever_another_asks_for(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-num-seqs", "2") as server:
        alone, beside = compare(server.address, 8.0)
    # The two steps that it finds on the device are the other's; each takes as long as its own prompt at most.
    in_flight_s = 2 * alone.first_token_s
    assert beside.first_token_s <= MORE * 2 * alone.first_token_s + in_flight_s
    assert beside.tokens_per_s >= LESS * alone.tokens_per_s / 2
