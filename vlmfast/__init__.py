"""Fused attention and contrastive-loss kernels for vision-language models.

Everything public is reachable from here and imported on first use, so that `import vlmfast` needs
torch alone and costs next to nothing:

    vlmfast.patch(model)            replace the attention layers of a model, in place
    vlmfast.functional as VF        functions with the calls of torch and xformers
    vlmfast.nn as vnn               drop-in modules
    vlmfast.distributed.Ring        how contrastive losses span the ranks of a process group
    vlmfast.use_backend, vlmfast.explain, vlmfast.info
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfast import distributed, functional, nn, ops, reference
    from vlmfast.backends import explain, use_backend
    from vlmfast.backends.info import info
    from vlmfast.integrations import PatchReport, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "__version__",
    "distributed",
    "explain",
    "functional",
    "info",
    "nn",
    "ops",
    "patch",
    "reference",
    "unpatch",
    "use_backend",
]

_SUBMODULES = {"distributed", "functional", "nn", "ops", "reference"}
_HOMES = {
    "explain": "vlmfast.backends",
    "info": "vlmfast.backends",
    "use_backend": "vlmfast.backends",
    "PatchReport": "vlmfast.integrations",
    "patch": "vlmfast.integrations",
    "unpatch": "vlmfast.integrations",
}

# An installed wheel carries vlmfast/kernels; in a checkout the folder stands beside the package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "launch.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"vlmfast.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vlmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
