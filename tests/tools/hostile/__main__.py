"""`python -m tools.hostile`: makes all tries, prints what is wrong and how many ended how."""

import argparse
import sys

import tools.hostile
from tools.hostile.children import GOOD, run, run_as_child, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=tools.hostile.__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="tries that have this in their name")
    parser.add_argument("--every", type=int, default=1, help="of these, every so many-th")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_as_child(*arguments.child, arguments.only)
        return
    counts, findings = summary(run(arguments.only, arguments.every))
    print("\n".join(findings))
    print(", ".join(f"{what}: {counts[what]}" for what in ("tried", *GOOD[:3], "findings")))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
