"""The conformance vectors of GGP/1: frames in hex, what they mean, and what must come of them.

Owns the vectors (`client_*.py`, `server_*.py`, written by hand from PROTOCOL.md) and how they become the JSON files
beside them (`make.py`). Never imports the codec: a vector says what the specification says, not what the code does.
Read by the tests of every client; README.md describes the files.
"""
