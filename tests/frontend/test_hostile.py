"""All attacks at once for a few seconds; the long run is `hostile.py`."""

from pathlib import Path

import pytest

from tests.frontend.attacks import ATTACKS
from tests.frontend.hostile import faults, run


@pytest.mark.alone
def test_a_server_under_all_attacks_loses_no_token_and_no_process(tmp_path: Path) -> None:
    found = run(tmp_path, calm_s=1.0, attack_s=5.0, keys=False, kinds=list(ATTACKS))
    assert faults(found) == []
    assert found.streams > 0
