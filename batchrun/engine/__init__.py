"""torch begins here: the model, its KV, attention over shared prefixes, sampling."""

import os

# Threads of OpenMP that wait for each other spin, for milliseconds where nobody says otherwise: beside other work, the
# one that is waited for does not get the processor meanwhile. A short spin costs nothing on quiet cores.
# libgomp reads this when torch loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
