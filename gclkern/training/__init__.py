"""What train.py stands on: data sets, recipes, networks, the optimizer step, checkpoints and run folders. Needs the extra `train`."""
