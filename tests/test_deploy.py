"""What deploy/ has for containers, systemd and Kubernetes names options, paths and metrics that there are, and gives a
server the time to drain."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from graphgen.commands.options import ENGINE_OPTIONS, SERVE_OPTIONS
from graphgen.gateway import metric_table
from graphgen.gateway.openapi import document
from graphgen.server.frontend.monitor import TIMEOUT_S

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "graphgen.service").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["graphgen"]
KUBERNETES_TEXT = (DEPLOY / "kubernetes.yaml").read_text()
DEPLOYMENT, SERVICE = list(yaml.safe_load_all(KUBERNETES_TEXT))
CONTAINER: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def entrypoint() -> list[str]:
    (found,) = [arguments for name, arguments in instructions() if name == "ENTRYPOINT"]
    words: list[str] = json.loads(found)
    return words


def unit(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


COMMANDS = {
    "docker": entrypoint(),
    "compose": [*entrypoint(), *COMPOSE["command"]],
    "systemd": shlex.split(unit("ExecStart")),
    "kubernetes": [*entrypoint(), *CONTAINER["args"]],
}


@pytest.mark.parametrize("where", list(COMMANDS))
def test_a_command_serves_with_options_that_there_are(where: str) -> None:
    words = COMMANDS[where]
    assert words[0].rpartition("/")[2] == "graphgen"
    assert words[1] == "serve"
    flags = {word for word in words if word.startswith("--")}
    assert "--http" in flags
    assert flags <= {option.flag for option in (*ENGINE_OPTIONS, *SERVE_OPTIONS)}


@pytest.mark.parametrize(
    ("where", "stop_s"),
    [
        ("compose", float(str(COMPOSE["stop_grace_period"]).removesuffix("s"))),
        ("systemd", float(unit("TimeoutStopSec"))),
        (
            "kubernetes",
            DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            - float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1]),
        ),
    ],
)
def test_a_server_that_drains_is_not_killed_before_its_grace_ends(where: str, stop_s: float) -> None:
    words = COMMANDS[where]
    assert stop_s >= float(words[words.index("--grace-s") + 1]) + 15


def test_probes_ask_what_is_served_and_wait_for_its_answer() -> None:
    probes = {name: probe for name, probe in CONTAINER.items() if name.endswith("Probe")}
    assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
    for probe in probes.values():
        assert probe["httpGet"]["path"] in document()["paths"]
        assert probe["timeoutSeconds"] > TIMEOUT_S, "a server whose worker hangs says so after that time"
    assert probes["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert probes["livenessProbe"]["httpGet"]["path"] == "/health", "a server that drains is alive"
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert path is not None
    assert path[1] in document()["paths"]


def test_the_gauges_that_routers_read_are_among_the_metrics() -> None:
    assert CONTAINER["args"][CONTAINER["args"].index("--metrics-names") + 1] == "vllm"
    named = set(re.findall(r"vllm:\w+", KUBERNETES_TEXT))
    assert named == {"vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
    table = Path(metric_table.__file__).read_text()
    assert all(f'"{name}"' in table for name in named)


def test_the_parts_of_the_manifest_fit_together() -> None:
    pod = DEPLOYMENT["spec"]["template"]
    assert pod["metadata"]["labels"].items() >= DEPLOYMENT["spec"]["selector"]["matchLabels"].items()
    assert pod["metadata"]["labels"].items() >= SERVICE["spec"]["selector"].items()
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert {port["targetPort"] for port in SERVICE["spec"]["ports"]} <= set(ports)
    http = entrypoint()[entrypoint().index("--http") + 1]
    assert ports["http"] == int(http.rpartition(":")[2])
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }


def test_the_dockerfile_copies_from_its_stages_and_installs_what_there_is() -> None:
    known = ["ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER"]
    assert {name for name, _ in instructions()} <= set(known)
    assert instructions()[0][0] in ("ARG", "FROM")
    stages = {arguments.split()[2] for name, arguments in instructions() if name == "FROM" and " AS " in arguments}
    assert set(re.findall(r"--from=(\w+)", DOCKERFILE)) <= stages
    extras = set(",".join(re.findall(r"/src\[([a-z,]+)\]", DOCKERFILE)).split(","))
    assert extras <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "USER graphgen" in last, "it does not run as root"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    copy = tmp_path / "graphgen.service"
    copy.write_text(re.sub("^ExecStart=.*$", "ExecStart=/bin/true", UNIT, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(copy) not in done.stderr, done.stderr
