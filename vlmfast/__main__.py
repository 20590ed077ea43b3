"""Fused kernels for vision-language models: what runs here, how fast, and how exactly."""

import argparse
import sys
from collections.abc import Sequence


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
        from vlmfast.profile import main as run_profile

        return run_profile(rest)
    try:
        from vlmfast.demo import main as run_demo
    except ModuleNotFoundError as error:
        print(f"the demo needs {error.name}: pip install vlmfast[demo]", file=sys.stderr)
        return 1
    return run_demo(rest)


if __name__ == "__main__":
    sys.exit(main())
