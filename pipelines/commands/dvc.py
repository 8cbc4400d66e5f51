"""`dvc` as `shovel run` starts it: what it says itself goes to a file descriptor, the terminal is for the stages.

python -m pipelines.commands.dvc FD repro ...
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    sys.stderr = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")  # its loggers write to it
    from dvc.cli import main

    sys.exit(main(sys.argv[2:]))
