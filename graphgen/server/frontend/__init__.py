"""The frontend process: a server's public sockets, and all that stands between them and the scheduler. No torch."""
