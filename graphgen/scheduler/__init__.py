"""The scheduler: pure policy (`policy`, and the parts it is made of) inside a thin process loop (`process`).

It is the only owner of requests and pages. It imports `graphgen.ipc` and the standard library, never torch.
"""
