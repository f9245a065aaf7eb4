"""``python -m shardopt``, the same as the command ``shardopt``."""

import sys

from shardopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
