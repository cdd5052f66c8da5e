"""Native kernels for weights stored sparse, in C, called through ctypes."""
