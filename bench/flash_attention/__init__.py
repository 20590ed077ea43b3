"""The row of `flash_attention`."""

from bench.family import Family
from bench.flash_attention import calls, cases, peers

FAMILY = Family(cases.CASES, cases.SELECTION, peers.CONTESTANTS, calls, cases.SWEEP)
