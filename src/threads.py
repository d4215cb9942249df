"""How the threads of torch wait for each other. To be imported before torch, since OpenMP reads it once.

By default they spin. Beside one other busy process each parallel region then waits for a thread that does not run. A
step of `train.py --recipe best` on two AVX2 cores, without and with this module: beside a process of pure Python 1.99
and 1.37 s (2 runs each); alone 0.75 and 0.86 s (medians of 5, from 0.72 to 0.83 and from 0.77 to 0.92). Where nothing
else runs, OMP_WAIT_POLICY=ACTIVE is faster: 0.77 s beside 0.82 s (medians of 3, in turn).
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:  # what the user set stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
