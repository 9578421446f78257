"""GGP/1, the public protocol: its messages, its frames, its error codes and its reference. Specified in PROTOCOL.md.

Owns what is on the wire and nothing else: no sockets, no policy. Both ends use it: the frontend, and the Python client.
"""
