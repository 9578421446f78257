"""What docs/serving.md tells a new user to type works as it stands there, but for the address and the model's name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ServerProcess

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text()
SECTION = TEXT.partition("## Over HTTP\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", SECTION, re.DOTALL)
SAYS = [
    '"finish_reason":"',
    "data: [DONE]",
    '"text_completion"',
    '"tokens":[',
    '{"status":"ok"}',
    "\n",
    "",
]
"""What each of them prints, among other things."""


@pytest.mark.parametrize("number", range(len(SAYS)))
def test_a_block_of_the_document_runs(server: ServerProcess, number: int) -> None:
    assert len(BLOCKS) == len(SAYS)
    language, text = BLOCKS[number]
    text = text.replace("http://127.0.0.1:8000", server.url).replace('"demo"', '"play"')
    command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "NO_PROXY": "127.0.0.1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[number] in done.stdout
    assert len(done.stdout) > 20
