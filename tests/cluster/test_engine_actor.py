"""What an engine's actor refuses before it starts anything, and that what it is told and says survives the way."""

import tempfile
from pathlib import Path

import pytest

from graphgen.base.version import __version__
from graphgen.cluster.engine_actor import EngineActor
from graphgen.cluster.orders import EngineOrder, EngineReport
from graphgen.ipc.errors import ConfigError
from graphgen.launch.config import EngineConfig

ORDER = EngineOrder(2, __version__, EngineConfig(device="cpu", max_model_len=99), "127.0.0.1", "key", 5.0)


def test_a_machine_with_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = EngineOrder(2, "0.0.9", ORDER.config, None, "key", 5.0)
    with pytest.raises(
        ConfigError, match=f"has graphgen {__version__}, and the cluster was started with 0.0.9: install"
    ):
        EngineActor(other.encode(), "127.0.0.1")
    assert not list(tmp_path.iterdir())


def test_orders_and_reports_are_what_they_were() -> None:
    assert EngineOrder.decode(ORDER.encode()) == ORDER
    report = EngineReport("serving", "here", "tcp://here:1", "tcp://here:2", "key", pids=(1, 2), num_slots=7)
    assert EngineReport.decode(report.encode()) == report
