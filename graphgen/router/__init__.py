"""Which of several engines serves a request: `policy.py` decides, and imports no socket, clock or torch."""
