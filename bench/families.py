"""Every row of the benchmark: the families, and layers and models that are patched with them."""

from bench import contrastive_loss, cross_attention, flash_attention, modules, window_attention
from bench.family import Family

FAMILIES: dict[str, Family] = {
    "flash_attention": flash_attention.FAMILY,
    "window_attention": window_attention.FAMILY,
    "cross_attention": cross_attention.FAMILY,
    "contrastive_loss": contrastive_loss.FAMILY,
    "layers": modules.LAYERS,
    "models": modules.MODELS,
}
