"""Leaves out of the engine's wheel what the client's has; all else is said in pyproject.toml.

The list there holds the client's packages too, since an editable install maps the whole folder, and a source archive
can only be built with all of it.
"""

import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CLIENT = Path(__file__).parent / "ipc" / "clients" / "python" / "pyproject.toml"


class BuildWithoutClient(build_py):
    def run(self) -> None:
        clients = set(tomllib.loads(CLIENT.read_text())["tool"]["setuptools"]["packages"])
        self.packages = [package for package in self.packages or () if package not in clients]
        super().run()


setup(cmdclass={"build_py": BuildWithoutClient})
