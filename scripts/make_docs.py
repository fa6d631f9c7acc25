"""Regenerates docs/commands.md from the command line itself. `tests/test_docs.py` fails when it is out of date."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

HEAD = """# Commands

Generated from the program by `make docs`; every line below is what `gridmill COMMAND --help` prints.

Each setting can be given four ways; the earlier wins: the flag (`--queue-timeout-seconds 10`), the environment
(`GRIDMILL_QUEUE_TIMEOUT_SECONDS=10`, or `GRIDMILL_NETWORK_…` and `GRIDMILL_NODE_…` to tell the programs apart),
`[network]` or `[node]` in `DATA/gridmill.toml` (`queue_timeout_seconds = 10`), the default. A name that is no setting
is refused, with the nearest one.

With `--json` the long-running commands print one line of JSON on stdout when they are ready to serve:
`{"base_url", "api_key" (up only), "model", "node_id" (node and up)}`; everything else goes to stderr.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed; one sentence on stderr says why |
| 2 | wrong usage or settings |
| 3 | the network cannot be reached, or refuses this node for good |
| 4 | the model cannot be loaded |
| 130 | interrupted |
"""


def commands_page() -> str:
    os.environ["COLUMNS"] = "110"
    from gridmill.cli import build_parser

    parts = [HEAD]
    for name, parser in walk(build_parser(), "gridmill"):
        text = parser.format_help().replace(str(Path.home()), "~")
        parts.append(f"## {name}\n\n```\n{re.sub(r'[ ]+$', '', text, flags=re.M).strip()}\n```\n")
    return "\n".join(parts)


def walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                yield from walk(child, f"{name} {word}")


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands_page())
    print("wrote docs/commands.md", file=sys.stderr)
