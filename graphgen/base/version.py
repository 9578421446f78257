"""What is installed: its name on a package registry, its version, and how to install more of it. Said here alone.

pyproject.toml reads the version from this file without importing it. The import and the command are `graphgen`; that
name on the Python package registry is another project's.
"""

DISTRIBUTION = "graphgen-serve"
__version__ = "0.1.0"


def how_to_install(extra: str) -> str:
    """What an error tells a user who lacks the packages of an extra of pyproject.toml."""
    return f"run pip install '.[{extra}]' in a clone of graphgen"
