"""What the server that forks ranks imports last: the heap of all that it imported is not collected again in each rank.

Forked ranks wait for less: no launcher ends them with the first that ends, and the store is on this machine. Tests that
start the launcher, or a process of its own, have the real waits.
"""

import atexit
import gc
import os
from datetime import timedelta

from tests.processes import set_constants

set_constants(
    {
        "base.console._LINGER_SECONDS": 0.5,
        # The rank that failed first looks for lost ones for 2 s before it speaks.
        "base.runtime._LET_SPEAK_SECONDS": 4.0,
        "base.runtime._STORE_TIMEOUT": timedelta(seconds=3),
    }
)

# Of the server alone, since ranks end by themselves: at its end, nanobind would list what Triton has left.
atexit.register(os._exit, 0)

gc.collect()
gc.freeze()
