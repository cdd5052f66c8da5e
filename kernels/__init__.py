"""Kernels, one a file: its reference, the kernel and the wrapper."""
