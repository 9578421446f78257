"""The device is found without torch, and one that torch cannot use is refused."""

import subprocess
import sys

import pytest
import torch

from graphgen import ConfigError
from graphgen.launch.devices import check_device, find_device


def test_hidden_devices_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device() == "cpu"


def test_cuda_without_a_cuda_build_of_torch_is_refused_and_never_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphgen.launch.devices._torch_has_cuda", lambda: False)
    assert find_device() == "cpu"
    with pytest.raises(ConfigError, match="device is 'cuda:1', torch here is built without CUDA"):
        check_device("cuda:1")
    check_device("auto")


def test_what_torch_was_built_for_is_read_without_importing_it() -> None:
    code = """
import sys
from graphgen.launch.devices import _torch_has_cuda
print(_torch_has_cuda(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(torch.version.cuda is not None), "False"]
