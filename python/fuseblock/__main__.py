"""Command line: ``python -m fuseblock env``."""

from __future__ import annotations

import argparse

from . import env


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m fuseblock", description="fuseblock's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "env", help="versions, devices, and which backend of which operator is available, or why not"
    )
    parser.parse_args()
    print(env.report())


if __name__ == "__main__":
    main()
