"""The scheduler: a pure policy (`policy`, and the parts that it names) and the process around it (`process`, `loop`).

It alone knows which requests there are and which pages they hold. It never imports torch, the models or the worker; the
policy imports no sockets either, and reads no clock.
"""
