"""How fast the kernels are on this machine, against what they replace.

`python -m bench flash_attention` races every contestant on every case and prints a table;
`pytest bench --benchmark-only` runs the same calls one by one under pytest-benchmark.

One family is one folder: its shapes in `cases.py`, who else computes it in `peers.py`, and inputs,
calls and formulas in `calls.py`; `families.py` names them all. The rest is shared.
"""
