"""Where there is no GPU, Triton interprets: it reads this when it is imported, which torch's compiler does as well."""

import os

from graphgen.launch.devices import find_device

if find_device() == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
