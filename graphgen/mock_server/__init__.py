"""A server of GGP/1 without a model, for authors of clients: scripted streams, stalls, faults and disconnects.

    graphgen mock-server            or, on a machine without torch,            python -m graphgen.mock_server

Owns the script (`script.py`), what a request is checked for (`checks.py`) and a loop of its own (`server.py`), which is
small because it has no engine behind it. Never imports torch, the engine or the frontend. Used by the tests of the
clients.
"""
