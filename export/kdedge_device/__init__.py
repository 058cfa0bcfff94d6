"""The board side: what a bundle needs to be checked, timed and used. Python 3.8, numpy, and a runtime; nothing else."""
