"""Draw ``loss.png`` from the log of a training run: python launch/plot_loss.py FOLDER."""

import sys

from train_lm.plot_loss import main

if __name__ == "__main__":
    sys.exit(main())
