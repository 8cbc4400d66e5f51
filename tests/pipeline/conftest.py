"""For the tests of this folder: modules that they share are found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
