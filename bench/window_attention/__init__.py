"""The row of `window_attention`."""

from bench.family import Family
from bench.window_attention import calls, cases, peers

FAMILY = Family(cases.CASES, cases.SELECTION, peers.CONTESTANTS, calls, cases.SWEEP, peers.REMARK)
