"""The same as ``launch/train_lm.py``, for ``python -m train_lm`` with ``launch`` on the path."""

import sys

from train_lm.main import main

if __name__ == "__main__":
    sys.exit(main())
