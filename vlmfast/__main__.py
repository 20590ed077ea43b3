"""Fused kernels for vision-language models: what runs here, how fast, and how exactly."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import vlmfast


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlmfast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built, found and usable here")
    commands.add_parser("demo", help="patch real models, check and time them", add_help=False)
    commands.add_parser("profile", help="where the time of a model goes", add_help=False)
    verify = commands.add_parser("verify", help="check every usable kernel against float64")
    verify.add_argument("--seed", type=int, help="of the random inputs; drawn anew by default")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("demo", "profile"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    if options.command == "info":
        from vlmfast.backends import info

        info()
        return 0
    if options.command == "verify":
        from vlmfast.verify import main as run_verify

        return 1 if run_verify(options.seed) else 0
    if options.command == "profile":
        return _program("profile").main(rest)
    try:
        from vlmfast.demo import main as run_demo
    except ModuleNotFoundError as error:
        print(f"the demo needs {error.name}: pip install vlmfast[demo]", file=sys.stderr)
        return 1
    return run_demo(rest)


def _program(command: str) -> ModuleType:
    """The module of a command: in a checkout that of a folder beside this package, if one has it.

    It knows what an installed package does not hold, and uses the module in here, which in turn
    knows nothing of it.
    """
    for root in vlmfast.__path__[1:]:  # of a checkout
        for path in sorted(Path(root).glob(f"*/{command}.py")):
            if path.parent != Path(__file__).resolve().parent:
                if root not in sys.path:
                    sys.path.insert(0, root)
                return importlib.import_module(f"{path.parent.name}.{command}")
    return importlib.import_module(f"vlmfast.{command}")


if __name__ == "__main__":
    sys.exit(main())
