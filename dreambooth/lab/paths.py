"""Where the lab's own weights lie."""

from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
BASE_FOLDER = WEIGHTS_FOLDER / "base"  # an ordinary diffusers folder
SCORERS_FOLDER = WEIGHTS_FOLDER / "scorers"
