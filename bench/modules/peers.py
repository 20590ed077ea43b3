"""The module itself, and what becomes of it."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch._functorch import config as functorch_config

import vlmfast
from bench.contestant import OURS, Contestant, never
from bench.modules.cases import ModuleCase

PrepareModule = Callable[[nn.Module, str], nn.Module]  # of the original and the mode


def _patched(case: ModuleCase) -> PrepareModule:
    """A patched copy; where no gradient is asked for, also packed for inference."""

    def prepare(module: nn.Module, mode: str) -> nn.Module:
        patched = copy.deepcopy(module)
        report = vlmfast.patch(patched, inference=mode == "fwd")
        if not report.replaced:
            raise RuntimeError(f"vlmfast.patch replaced nothing: {report}")
        return patched

    return prepare


def _original(case: ModuleCase) -> PrepareModule:
    return lambda module, mode: module


def _compiled(case: ModuleCase) -> PrepareModule:
    def prepare(module: nn.Module, mode: str) -> nn.Module:
        functorch_config.donated_buffer = False
        return torch.compile(copy.deepcopy(module))

    return prepare


CONTESTANTS = (
    Contestant(OURS, never, _patched),
    Contestant("original", never, _original),
    Contestant("torch.compile", never, _compiled, compiles=True),
)

REMARK = "forward is that of vlmfast.patch(module, inference=True), which also packs Linear weights"
