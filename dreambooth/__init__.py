"""DreamBooth as a measured experiment: fine-tune on one subject, and say what was learned and what was lost."""

import os

# Idle threads that spin make two processes on two cores many times slower; libgomp reads this once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
