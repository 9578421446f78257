"""What `graphgen cluster status` prints of a cluster that waits for something."""

import contextlib
import re
import uuid

import msgspec
import pytest
from typer.testing import CliRunner

from graphgen.cluster.answering import Answering
from graphgen.cluster.options import ClusterOptions
from graphgen.cluster.record import SOCKET, EngineLine, Record
from graphgen.cluster.roster import EngineStatus
from graphgen.cluster.up import first_status
from graphgen.commands import cluster
from graphgen.commands.cli import app

DRAINS = EngineLine(EngineStatus(3, "draining", "node-b", "tcp://b:1", 0, 7.0, "", (1, 2)), 5, 0, 0.5)


def test_it_says_what_is_waited_for_and_how_old_its_news_of_engines_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LONG_S", 0.0)
    options = ClusterOptions(name=f"t{uuid.uuid4().hex[:12]}")
    with (
        contextlib.closing(Record.claim(options.name)) as record,
        contextlib.closing(Answering(record.folder / SOCKET, first_status(options))) as answering,
    ):
        with answering.doing("starting Ray here"):
            said = CliRunner().invoke(app, ["cluster", "status", "--name", options.name]).stdout
        assert re.search(r"starting, up for \d+ s", said)
        assert re.search(r"starting Ray here for \d+ s\n$", said), "there is no engine to show"
        answering.publish(msgspec.structs.replace(first_status(options), phase="serving", engines=(DRAINS,)))
        with answering.doing("stopping engine 2"):
            said = CliRunner().invoke(app, ["cluster", "status", "--name", options.name]).stdout
        assert re.search(r"stopping engine 2 for \d+ s; engines are shown as they were \d+ s ago\n", said)
        assert "draining" in said
        assert "7 s" in said
