"""How the threads of torch wait for each other. To be imported before torch, since OpenMP reads it once.

By default they spin, and beside one other busy process each parallel region waits for a thread that does not run. Put
to sleep at once they wake late. So they spin briefly: 1000 times in GNU's OpenMP, about 20 microseconds.

Milliseconds for a training step of the quick recipe, measured by hand in a loop, in crops of 128 (of 256) pixels,
medians of 9 steps on two AVX2 cores; "busy" is beside a process of pure Python:

    | threads | quiet | busy |
    |---|---|---|
    | two, OMP_WAIT_POLICY=ACTIVE | 110 (381) | not measured |
    | two, GOMP_SPINCOUNT=20000 | 156 (410) | 745 (1392) |
    | two, GOMP_SPINCOUNT=1000 (this module) | 153 (426) | 224 (698) |
    | two, OMP_WAIT_POLICY=PASSIVE | 277 (475) | 201 (580) |
    | one | 135 to 156 (517 to 612) | 138 (517) |
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:  # what the user set stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's OpenMP heeds it in spite of the policy
