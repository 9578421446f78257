"""The Python client of a server: Engine and AsyncEngine for an engine elsewhere. No torch, no tokenizer."""
