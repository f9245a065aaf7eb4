"""Everything that needs a GPU, in one command: see ``run.sh``."""
