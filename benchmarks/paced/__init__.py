"""Stand-ins that take their time and compute nothing, for benchmarks of all that is around them on a machine without a
GPU.

    engine                      an engine that gives every request a token at a set pace
    worker, scheduler, launch   a worker that waits as long as a device of a table would take, behind a real scheduler
"""
