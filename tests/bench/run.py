"""Measure: ``.venv/bin/python tests/bench/run.py [names] [--quick]``; ``sh .ci/bench`` sets up first."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    # Read once, when torch and transformers are imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tests.bench.command import main

    sys.exit(main(sys.argv[1:]))
