"""Command line: ``python -m fuseblock env`` and ``python -m fuseblock tiers``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import _tiers, env


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m fuseblock", description="fuseblock's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "env", help="versions, devices, and which backend of which operator is available, or why not"
    )
    tiers = commands.add_parser(
        "tiers",
        help="what each tier of the LSTM recurrence takes of a GPU, and the largest H that it holds there",
    )
    tiers.add_argument("--json", action="store_true", help="print JSON, every kernel included")
    args = parser.parse_args(argv)
    if args.command == "env":
        print(env.report())
    elif args.json:
        print(json.dumps(_tiers.report(), indent=1))
    else:
        _tiers.show(_tiers.report())


if __name__ == "__main__":
    main()
