"""What holds for all tests.

Where there is no GPU, Triton interprets: it reads this when it is imported, which torch's compiler does as well.
Hypothesis holds no example to the clock: a machine may stall.
"""

import os

from hypothesis import HealthCheck, settings

from graphgen.launch.devices import find_device

if find_device() == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("graphgen", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graphgen")
