"""How fast the kernels are on this machine, against what they replace.

`python -m bench flash_attention` races every contestant on every case and prints a table;
`pytest bench --benchmark-only` runs the same calls one by one under pytest-benchmark.

One family is one row here, too: its cases in `cases.py`, its peers in `peers.py`, and a module of
its own that makes inputs, calls and formulas out of them. The rest is shared.
"""
