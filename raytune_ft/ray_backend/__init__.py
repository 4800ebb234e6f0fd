"""The only package that imports Ray."""

import os

# A call after the cluster is gone, such as one of a thread that outlives it, is an error; Ray would
# start another cluster. Ray reads this when it is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
