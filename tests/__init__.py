"""Tests. They mirror the modules; what several of them need lies at the top."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository's folder."""
