"""Which backend runs a call, and what is usable here.

A page `backends/<family>.py` holds the predicates `cpu` and `triton` of its family: the reasons why
that backend cannot run given inputs, none where it can; and `sample_inputs`, what these look at of
a call in plain float32 and of no particular size.
"""

from vlmfast.backends.info import info, refusals
from vlmfast.backends.selection import (
    BACKENDS,
    Explanation,
    check_backend,
    choose,
    explain,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "Explanation",
    "check_backend",
    "choose",
    "explain",
    "info",
    "refusals",
    "use_backend",
]
