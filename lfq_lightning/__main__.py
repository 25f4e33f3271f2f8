"""The command line: `python -m lfq_lightning COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lfq_lightning.commands import bench, compare, plot, report

COMMANDS = (plot, report, compare, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake in what was asked for is said in a line, without a traceback."""
    parser = argparse.ArgumentParser("python -m lfq_lightning", description="Looks at quantization-aware runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
