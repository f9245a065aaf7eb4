"""The training job that ``launch/train_lm.py`` starts: a small language model on all ranks."""
