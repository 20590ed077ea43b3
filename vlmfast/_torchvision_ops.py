"""Lets torchvision be imported beside a torch build that its wheel was not compiled for.

The wheel of torchvision on PyPI is compiled against the CUDA build of torch. Beside a CPU-only
torch its C++ operators cannot be loaded, and the import stops where it registers their fakes. Two
schemas without kernels are enough for its models, and for timm, open_clip and transformers, which
import it. For the demo and the tests; the product never imports this file.
"""

import importlib
import sys

import torch

__all__ = ["import_torchvision"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Imports torchvision; declares its missing operators first, if the plain import has failed."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        if hasattr(torch.ops.torchvision, "nms"):  # then something else has failed
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)
        # The schemas live as long as the object that declared them.
        _libraries.append(library)
        importlib.import_module("torchvision")
