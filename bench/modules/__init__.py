"""The rows of `layers` and `models`: modules as their libraries make them, against them patched."""

from bench.family import Family
from bench.modules import calls, cases, peers

LAYERS = Family(cases.LAYERS, cases.SELECTED_LAYERS, peers.CONTESTANTS, calls, remark=peers.REMARK)
MODELS = Family(cases.MODELS, cases.SELECTED_MODELS, peers.CONTESTANTS, calls, remark=peers.REMARK)
