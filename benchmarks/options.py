"""The command line that scripts which start an engine have in common: its options, declared once.

Owns names, types and help; what an option means and its default is EngineConfig's. Each script adds its own.
"""

import argparse
from typing import Unpack, cast

from graphgen.launch.config import EngineSettings

_NAMES = (
    "model",
    "load_format",
    "device",
    "max_model_len",
    "max_num_seqs",
    "token_budget",
    "num_pages",
    "cpu_threads",
    "compile",
)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """description: the script's docstring, printed as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_engine_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds them. Returns the group of --token-budget, for options that exclude it."""
    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", help="folder or hub id; without it the embedded demo model")
    engine.add_argument("--load-format", choices=("auto", "safetensors", "dummy"))
    engine.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    engine.add_argument("--max-model-len", type=int, metavar="TOKENS")
    engine.add_argument("--max-num-seqs", type=int, metavar="REQUESTS", help="most requests that run at once")
    engine.add_argument("--num-pages", type=int, metavar="PAGES", help="of the KV cache; without it what fits")
    engine.add_argument("--cpu-threads", type=int, metavar="THREADS")
    engine.add_argument("--compile", action=argparse.BooleanOptionalAction)
    budgets = engine.add_mutually_exclusive_group()
    budgets.add_argument("--token-budget", type=int, metavar="ROWS")
    return budgets


def engine_settings(options: argparse.Namespace, **more: Unpack[EngineSettings]) -> EngineSettings:
    """The keyword arguments of EngineConfig that were given, and `more`; it has its own defaults for the others."""
    given = {name: getattr(options, name) for name in _NAMES if getattr(options, name) is not None}
    return cast(EngineSettings, {**given, **more})
