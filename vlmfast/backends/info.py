"""What is built, found and usable on this machine."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

import vlmfast
from vlmfast.backends import selection
from vlmfast.backends.common import is_installed
from vlmfast.checks import check_choice
from vlmfast.families import FAMILIES, rows
from vlmfast.ops.common import EXTENSION_ERROR, EXTENSION_FILE

_ROWS = rows("vlmfast.backends")

_OPTIONAL_LIBRARIES = (
    "triton",
    "torchvision",
    "timm",
    "transformers",
    "open_clip",
    "flamingo_pytorch",
    "xformers",
)


def _version(library: str) -> str | None:
    """The version of an installed library, without importing it."""
    if not is_installed(library):
        return None
    try:
        distributions = importlib.metadata.packages_distributions().get(library, [library])
        return importlib.metadata.version(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def refusals(family: str, device: str) -> dict[str, list[str]]:
    """Each backend's reasons not to run plain float32 inputs of a family on a device."""
    check_choice("family", family, FAMILIES)
    inputs = _ROWS[family].sample_inputs(device)
    return {name: predicate(*inputs) for name, predicate in selection.PREDICATES[family].items()}


def info() -> dict[str, Any]:
    """Prints and returns what is built, found and usable on this machine.

    Libraries are looked up, not imported. The keys are vlmfast, python, torch, machine, extension,
    cpu_isa, cpu_isas, gpus, libraries, environment and families.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    built = EXTENSION_ERROR is None
    found: dict[str, Any] = {
        "vlmfast": vlmfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "extension": EXTENSION_ERROR or EXTENSION_FILE,
        "cpu_isa": torch.ops.vlmfast.cpu_isa() if built else None,
        "cpu_isas": torch.ops.vlmfast.cpu_isas().split(",") if built else [],
        "gpus": [_describe_gpu(index) for index in range(torch.cuda.device_count())],
        "libraries": {name: _version(name) for name in _OPTIONAL_LIBRARIES},
        "environment": {
            **{name: value for name, value in os.environ.items() if name.startswith("VLMFAST_")},
            "VLMFAST_BACKEND": selection.FROM_ENVIRONMENT,  # that counts
        },
        "families": {
            family: {device: refusals(family, device) for device in devices} for family in FAMILIES
        },
    }
    print(_format_info(found))
    return found


def _describe_gpu(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, capability))})"


def _format_info(found: dict[str, Any]) -> str:
    lines = [f"{name:10} {found[name]}" for name in ("vlmfast", "python", "torch", "machine")]
    lines.append(f"{'extension':10} {found['extension']}")
    if found["cpu_isas"]:
        isas = ", ".join(found["cpu_isas"])
        lines.append(f"{'CPU':10} {found['cpu_isa']} (this machine runs {isas})")
    lines.append(f"{'GPU':10} {', '.join(found['gpus']) or 'none'}")
    for name, version in found["libraries"].items():
        lines.append(f"{name:16} {version or 'not found'}")
    for name, value in found["environment"].items():
        if value is None:
            continue
        lines.append(f"{name}={value}")
    for family, devices in found["families"].items():
        for device, reasons_of in devices.items():
            lines.append(f"{family} on {device} tensors")
            for name, reasons in reasons_of.items():
                lines.append(f"  {name:10} {'; '.join(reasons) or 'usable'}")
    return "\n".join(lines)
