"""What is installed: the names of the distributions, their version, and how to install more. Said here alone.

Both pyproject.toml read the version from this file without importing it. The import and the command are `graphgen`;
that name on the Python package registry is another project's.
"""

DISTRIBUTION = "graphgen-serve"
CLIENT_DISTRIBUTION = "graphgen-client"
"""A part of the other, which depends on it."""
__version__ = "0.1.0"

ENGINE_IS_MISSING = (
    f"comes with the engine, {DISTRIBUTION}, and only {CLIENT_DISTRIBUTION} is installed here: run pip install"
    " ./ipc/clients/python . in a clone of graphgen"
)


def how_to_install(extra: str) -> str:
    """What an error tells a user who lacks the packages of an extra of pyproject.toml."""
    return f"run pip install ./ipc/clients/python '.[{extra}]' in a clone of graphgen"
