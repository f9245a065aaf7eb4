"""Train a byte-level transformer with a sharded optimizer: mpirun runs this script on every rank.

For example ``mpirun -n 4 python launch/train_lm.py --steps 200``. The code is in the package of the
same name beside this file; on the import path a package comes before a script.
"""

import sys

from train_lm.main import main

if __name__ == "__main__":
    sys.exit(main())
