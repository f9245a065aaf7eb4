"""``python -m shardopt.cli``, the same as ``shardopt``."""

import sys

from shardopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
