"""The kernels' machine code, compiled and read on a machine without a GPU: what the static tests and the predicted times stand on."""
