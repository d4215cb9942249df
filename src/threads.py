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

On two cores with AVX-512, this module, two runs each: `train.py --recipe best --base-c 16 --epochs 1
--steps-per-epoch 20 --val-split 1 --no-amp`, seconds a step, and `predict.py` on four photographs of HRF, seconds in
all:

    | beside | train.py | predict.py |
    |---|---|---|
    | nothing | 0.51, 0.47 | 8.0, 6.7 |
    | a process of pure Python | 0.94, 0.85 | 9.2, 9.5 |
    | numpy with two threads | 1.05, 1.03 | 12.7, 13.8 |
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  # said here, because every script begins with this module
    sys.exit(f"error: needs Python 3.10 or newer; this is {sys.version.split()[0]}")

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:  # what the user set stays
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's OpenMP heeds it in spite of the policy
