"""The row of `contrastive_loss`."""

from bench.contrastive_loss import calls, cases, peers
from bench.family import Family

FAMILY = Family(cases.CASES, cases.SELECTION, peers.CONTESTANTS, calls, cases.SWEEP)
