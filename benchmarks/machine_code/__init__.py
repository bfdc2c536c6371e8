"""The kernels' machine code, compiled and read on a machine without a GPU, for the static tests and the predicted times."""
