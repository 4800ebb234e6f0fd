"""From a YAML file to a merged and evaluated model, on a laptop or on a Ray cluster."""

import logging

__version__ = "0.1.0"

# PEFT imports it wherever it is installed, and then it says which of its kernels it lacks.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
