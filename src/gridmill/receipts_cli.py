"""`gridmill receipts …`: take receipts out of a network or a node, look at one, and check files of them offline.

A node's file is only read, so all of it also works while the node runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gridmill.operator_cli import EXIT_FAILED, data_folder, in_credits, operate_on, operator_command
from gridmill.settings_loader import SettingsError

Environment = Mapping[str, str]
Lines = Iterator[dict[str, Any]]


def add_receipts_commands(commands: Any) -> None:
    receipts = commands.add_parser(
        "receipts",
        help="export, show and check receipts",
        description="Receipts are signed by both sides: what a node served, what it earns, what the user paid.",
    ).add_subparsers(metavar="COMMAND", required=True)

    export = operator_command(receipts, "export", _export, "write receipts to a file that anyone can check")
    export.add_argument("--node", metavar="NODE_ID", default="", help="of a network: only this node's")
    export.add_argument(
        "--account", metavar="ACCOUNT", default="", help="of a network: only this account's works, each with its proof"
    )
    export.add_argument(
        "--period", metavar="START", help="only the period that begins then: Unix seconds, or a day like 2026-12-31"
    )
    export.add_argument(
        "--with-salts", action="store_true", help="with what lets whoever has the ids check the hashes: keep it secret"
    )
    export.add_argument("-o", "--output", metavar="FILE", help="file to write (default: standard output)")

    show = operator_command(receipts, "show", _show, "show the receipts of one work")
    show.add_argument(
        "work", metavar="WORK_ID", help="an answer's id, such as chatcmpl-…, or that of one of its choices"
    )
    for command in (export, show):
        command.add_argument(
            "--of",
            choices=("network", "node"),
            help="whose receipts, where DIR holds both (default: the network's)",
        )

    verify = receipts.add_parser(
        "verify",
        help="check files of receipts, offline",
        description="Checks signatures, hash chains, totals, prices and proofs with public keys alone. Of two files, "
        "such as the network's and the node's, it also says where they differ.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("files", metavar="FILE", nargs="+", help="files that `gridmill receipts export` wrote")
    verify.add_argument("--network-key", metavar="HEX", help="the network that they must be of: 64 hex digits")
    verify.add_argument("--node-key", metavar="HEX", help="the node that they must be of: 64 hex digits")
    verify.add_argument(
        "--strict",
        action="store_true",
        help="what is not countersigned is wrong too, and in an account's file what has no root yet",
    )
    verify.add_argument("--json", action="store_true", help="print JSON")


# ---------------------------------------------------------------- export and show


def _export(arguments: argparse.Namespace, environ: Environment) -> int:
    from gridmill.wire.receipts_file import EVERY_PERIOD, written

    period = EVERY_PERIOD if arguments.period is None else _period(arguments.period)
    outbox = _node_file(arguments, environ)
    if outbox is None:
        lines = _pages(arguments, environ, period)
    elif arguments.node or arguments.account:
        raise SettingsError("a node has only its own receipts: leave out --node and --account")
    else:
        lines = _of_node(lambda module: module.export(outbox, period=period, with_salts=arguments.with_salts))
    count = 0
    with _output(arguments.output) as file:
        for raw in written(lines):
            file.write(raw)
            count += 1
    if arguments.output is not None:
        made = {"file": arguments.output, "lines": count}
        print(json.dumps(made) if arguments.json else f"Wrote {count} lines to {arguments.output}.")
    return 0


def _pages(arguments: argparse.Namespace, environ: Environment, period: int) -> Lines:
    cursor: list[Any] | None = None
    while True:
        page = operate_on(
            arguments,
            environ,
            "receipts.export",
            node=arguments.node,
            account=arguments.account,
            period=period,
            with_salts=arguments.with_salts,
            cursor=cursor,
        )
        yield from page["lines"]
        cursor = page["cursor"]
        if cursor is None:
            return


def _of_node(read: Callable[[Any], Iterable[dict[str, Any]]]) -> Lines:
    """What the node's file says; its one kind of failure becomes ours."""
    from gridmill.network.control import ControlError
    from gridmill.node import outbox

    try:
        yield from read(outbox)
    except outbox.OutboxUnusable as problem:
        raise ControlError(str(problem)) from problem


@contextlib.contextmanager
def _output(name: str | None) -> Iterator[BinaryIO]:
    """A file appears whole or not at all, and for nobody else: with salts it is a secret."""
    if name is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).expanduser()
    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _show(arguments: argparse.Namespace, environ: Environment) -> int:
    outbox = _node_file(arguments, environ)
    if outbox is None:
        shown = operate_on(arguments, environ, "receipts.show", work_id=arguments.work)
    else:
        shown = list(_of_node(lambda module: module.show(outbox, arguments.work)))
    if arguments.json:
        print(json.dumps(shown))
    else:
        for entry in shown:
            print(_sentences(entry))
    if not shown:
        print(f"gridmill: no receipt of {arguments.work}: it has not ended, or is of another network", file=sys.stderr)
    return 0 if shown else EXIT_FAILED


def _sentences(entry: dict[str, Any]) -> str:
    """One receipt for a person."""
    if entry["kind"] == "waiting":
        return (
            f"work {entry['work_id']}, segment {entry['epoch']}: not receipted yet; this node was given "
            f"{entry['input_tokens']} tokens and sent {entry['sent_tokens']}"
        )
    from gridmill.wire.identity import node_id_of

    leaf, statement, price = entry["leaf"], entry["statement"], entry["leaf"]["price"]
    prices = f"{price['input_nanocredits']}/{price['cached_input_nanocredits']}/{price['output_nanocredits']}"
    if statement["node_signature"]:
        signed = "network and node" + (" (no record of its own)" if statement["remark"] else "")
    elif statement["remark"]:
        signed = f"network; the node disputes it: {statement['remark']}"
    else:
        signed = "network; the node has not countersigned yet"
    rows = {
        "work": f"{leaf['work_id']}, segment {leaf['epoch']}, {leaf['finish']}",
        "node": node_id_of(bytes.fromhex(entry["node_key"])),
        "class": entry["class_id"][:16],
        "leaf": f"{entry['seq']} of the period {entry['period_start_seconds']}",
        "input": f"{leaf['input_tokens']} tokens, {leaf['cached_tokens']} of them cached",
        "output": f"{leaf['output_tokens']} tokens from position {leaf['start']}",
        "price": f"{prices} nanocredits per token ({leaf['price_id']})",
        "node earns": f"{in_credits(leaf['pay_nanocredits'])} credits",
        "user pays": f"{in_credits(leaf['charge_nanocredits'])} credits",
        "signed by": signed,
    }
    return "\n".join(f"{name + ':':12}{value}" for name, value in rows.items()) + "\n"


def _node_file(arguments: argparse.Namespace, environ: Environment) -> Path | None:
    """The node's file where its receipts are meant; None for the network's."""
    folder = data_folder(arguments, environ)
    path = folder / "receipts.sqlite"
    if not path.exists() and (folder / "node" / "receipts.sqlite").exists():
        path = folder / "node" / "receipts.sqlite"  # where `gridmill up` keeps its node
    network = arguments.database or (folder / "network.key").exists()
    if arguments.of == "network" or (arguments.of is None and (network or not path.exists())):
        return None
    if not path.exists():
        raise SettingsError(f"{folder} holds no receipts of a node: give the node's --data folder")
    return path


def _period(text: str) -> int:
    from gridmill.network.usage import DAY_SECONDS, parse_day

    try:
        return int(text) if text.isdecimal() else parse_day(text) * DAY_SECONDS
    except ValueError as problem:
        raise SettingsError(f"--period: {problem}") from problem


# ---------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace, environ: Environment) -> int:
    from gridmill.wire.receipts_file import LINE_BYTES_MAX, Found, check, compare

    keys = {
        "network_key": _key(arguments.network_key, "--network-key"),
        "node_key": _key(arguments.node_key, "--node-key"),
    }
    found: list[Found] = []
    for name in arguments.files:
        path = Path(name).expanduser()
        if not path.exists():
            raise SettingsError(f"{name} does not exist: `gridmill receipts export -o FILE` writes one")
        with path.open("rb") as file:
            # A line beyond the limit comes in pieces, each of which is wrong.
            lines = iter(lambda file=file: file.readline(LINE_BYTES_MAX + 1), b"")  # type: ignore[misc]
            found.append(check(name, lines, **keys, strict=arguments.strict))
    problems = [problem for one in found for problem in one.problems]
    for first, second in itertools.pairwise(found):
        problems += compare(first, second)
    if arguments.json:
        print(
            json.dumps(
                {
                    "sound": not problems,
                    "problems": [{"file": p.file, "line": p.line, "sentence": p.sentence} for p in problems],
                    "files": [_facts(one) for one in found],
                }
            )
        )
    else:
        for problem in problems:
            print(problem)
        for one in found:
            print(_summary(one, trusted=arguments.network_key is not None))
        print(f"NOT SOUND: {len(problems)} problems." if problems else "Sound.")
    return EXIT_FAILED if problems else 0


def _facts(found: Any) -> dict[str, Any]:
    return {
        "file": found.file,
        "by": found.by,
        "leaves": found.leaves,
        "pay_nanocredits": found.pay_nanocredits,
        "charge_nanocredits": found.charge_nanocredits,
        "not_countersigned": found.leaves_not_countersigned,
        "without_root": found.unproven,
        "after_a_gap": found.unchained,
        "claims_over_another_output": found.claims_wrong,
        "disputed_statements": found.disputed,
        "roots": found.roots,
        "notes": found.notes,
    }


def _summary(found: Any, *, trusted: bool) -> str:
    lines = [
        f"{found.file}: {found.leaves} leaves; nodes earned {in_credits(found.pay_nanocredits)} credits, "
        f"users paid {in_credits(found.charge_nanocredits)}"
    ]
    if found.leaves_not_countersigned:
        lines.append(f"  {found.leaves_not_countersigned} leaves are not countersigned by their node (yet)")
    if found.claims_wrong:
        lines.append(f"  {found.claims_wrong} leaves carry a claim of their node that is not over the output counted")
    if found.unproven:
        lines.append(f"  {found.unproven} leaves are of periods that are open: no root proves them yet")
    if found.unchained:
        lines.append(
            f"  {found.unchained} leaves follow a gap: signed totals bound what they may say, and no hash does"
        )
    lines += [f"  {note}" for note in found.notes]
    if not trusted:
        lines.append("  checked against the keys in the file itself: give --network-key to say whose they must be")
    return "\n".join(lines)


def _key(text: str | None, flag: str) -> bytes | None:
    if text is None:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise SettingsError(f"{flag} must be 64 hex digits, as `gridmill status` shows the network's")
    return key
