"""What every test stands on: one thread, no network, no colours."""

import os

# Read when torch and the hub's client are imported, so before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
