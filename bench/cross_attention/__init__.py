"""The row of `cross_attention`."""

from bench.cross_attention import calls, cases, peers
from bench.family import Family

FAMILY = Family(cases.CASES, cases.SELECTION, peers.CONTESTANTS, calls, cases.SWEEP)
