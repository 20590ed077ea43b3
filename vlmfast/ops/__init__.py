"""Operators of torch.library: for each family and backend one forward and one backward operator.

A page `ops/<family>.py` holds the schemas, the fake implementations, the autograd formula and the
FLOP formulas of its family. The kernels themselves are found when they are needed: those in C++ by
loading `vlmfast._C` (see `ops.common`), those in Triton on the first call.
"""
