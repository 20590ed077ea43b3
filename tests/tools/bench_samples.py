"""Small cases, a contestant that is wrong, and figures that nobody measured."""

from collections.abc import Sequence
from dataclasses import replace

from bench import __main__ as command_line
from bench.contest import Contest, run
from bench.contestant import OURS, Contestant
from bench.flash_attention.cases import AttentionCase
from bench.flash_attention.peers import CONTESTANTS, eager_attention
from bench.measure import Ceilings, Work
from bench.results import Row

SELF = AttentionCase("tiny", "a test", 2, 3, 10, 10, 16)
CAUSAL = replace(SELF, name="tiny-causal", is_causal=True)
CROSS = replace(SELF, name="tiny-cross", query_length=5, key_length=12)
FLASH_ATTENTION, SDPA, EAGER = CONTESTANTS[:3]
# Who computes attention on a CPU without compiling first.
ON_CPU = {OURS, "torch SDPA", "eager", "SDPA math"}
WORK = Work(10**9, 10**6, 10**6)
CEILINGS = Ceilings({"float32": 1e9, "bfloat16": 1e9}, {"float32": "", "bfloat16": ""}, 1e9, 1e9)


def raced(
    case: AttentionCase, dtype: str, mode: str, contestants: Sequence[Contestant] | None = None
) -> Row:
    return run(Contest("flash_attention", case, dtype, mode), 0.0, contestants)


def planted(name: str, damage: float) -> Contestant:
    """Attention whose output is off by a factor of 1 + damage."""

    def prepare(case: AttentionCase):
        eager = eager_attention(case)
        return lambda query, key, value: eager(query, key, value) * (1 + damage)

    return Contestant(name, lambda case, dtype: None, prepare)


def parsed(*arguments: str):
    return command_line._parser().parse_args(arguments)
