"""How the threads of torch wait for each other. To be imported before torch, since OpenMP reads it once.

By default they spin. Beside one other busy process each parallel region then waits for a thread that does not run, and
a training step takes nine times as long. With sleeping threads it takes less than twice as long.
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:  # what the user set stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
