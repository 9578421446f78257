"""The model families graphgen runs, as data: one small module a group of kin, and the table of their rows.

family.py has the words they are written in, reader.py the way from a config to a ModelSpec. CONTRIBUTING says how to
add one."""

from graphgen.models.families.reader import load_spec, spec_from_hf
from graphgen.models.families.table import FAMILIES

__all__ = ["FAMILIES", "load_spec", "spec_from_hf"]
