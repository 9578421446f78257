"""A server: the supervisor, which starts and watches, and the frontend, which owns the public sockets."""
