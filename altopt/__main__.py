"""``python -m altopt`` and ``torchrun -m altopt``: the command line, from any folder.

This is the one module of altopt that imports what is above it.
"""

import sys
from pathlib import Path

# Python puts the folder one stands in first, where a cli.py of the user's own may lie, or the folder of this file,
# whose datasets/ and config.py are not the modules that others may mean by these names.
if not sys.flags.safe_path:
    del sys.path[0]
sys.path.insert(0, str(Path(__file__).parents[1]))

from cli import run

if __name__ == "__main__":
    run()
