"""The kernel families: every list of them derives from this one.

A family is one row: it has a module of its name in each folder, where what lists need of it stands
under one name, such as `CASES` in `vlmfast/verify/<family>.py`.
"""

import importlib
from types import ModuleType

FAMILIES = ("flash_attention", "window_attention", "cross_attention", "contrastive_loss")


def rows(package: str) -> dict[str, ModuleType]:
    """By family, its module in a package."""
    return {family: importlib.import_module(f"{package}.{family}") for family in FAMILIES}
