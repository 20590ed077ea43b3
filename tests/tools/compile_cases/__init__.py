"""The launches that the compile gate compiles: real models' shapes, and every feature once."""

from tools.compile_cases import (
    contrastive_loss,
    cross_attention,
    flash_attention,
    window_attention,
)
from tools.compile_cases.common import CompileCase

# A family takes part by a page of cases and a line here.
CASES: dict[str, list[CompileCase]] = {
    "flash_attention": flash_attention.CASES,
    "window_attention": window_attention.CASES,
    "cross_attention": cross_attention.CASES,
    "contrastive_loss": contrastive_loss.CASES,
}
