"""One thread for each of the workers (pytest-xdist): small tensors gain nothing by more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
