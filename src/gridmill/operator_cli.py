"""An operator's commands: accounts, keys, credit, the ledger, classes, status.

Each runs through the control socket of a running network, or on its database while none runs. Amounts are credits in
decimal text here, and whole nanocredits everywhere else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gridmill.settings_loader import SettingsError, field_names

EXIT_FAILED, EXIT_USAGE = 1, 2

Environment = Mapping[str, str]


def add_operator_commands(commands: Any) -> None:
    """The parsers of all of them, each with the function that runs it."""
    accounts = commands.add_parser(
        "accounts",
        help="create, list and freeze accounts",
        description="An account pays for what its keys ask, and earns what its nodes serve.",
    ).add_subparsers(metavar="COMMAND", required=True)
    create = operator_command(accounts, "create", _accounts_create, "create an account without keys")
    create.add_argument("name", metavar="NAME", help="whose it is")
    operator_command(accounts, "list", _accounts_list, "list accounts and what they have")
    for verb, run, help_text in (
        ("show", _accounts_show, "show an account, its keys and its nodes"),
        ("freeze", _accounts_freeze, "stop all keys of an account at once; its money stays"),
        ("unfreeze", _accounts_freeze, "let the keys of an account work again"),
    ):
        command = operator_command(accounts, verb, run, help_text)
        command.set_defaults(verb=verb)
        _add_account(command)

    keys = commands.add_parser(
        "keys", help="create, list and revoke API keys", description="API keys of a network."
    ).add_subparsers(metavar="COMMAND", required=True)
    create = operator_command(keys, "create", _keys_create, "create a key; it is shown this once")
    create.add_argument("name", metavar="NAME", help="what it is for, or whose")
    create.add_argument("--account", metavar="ACCOUNT", help="its account, by id or name (default: a new one)")
    create.add_argument(
        "--scope",
        action="append",
        metavar="SCOPE",
        help="inference: may ask; node: may join as a node; operator: may operate the network over HTTP; several as a "
        "comma list (default: inference)",
    )
    create.add_argument("--budget", metavar="CREDITS", help="what it may spend in all")
    create.add_argument("--requests-per-minute", metavar="N", type=int, help="how often it may ask, at each gateway")
    create.add_argument("--cost-per-minute", metavar="CREDITS", help="what it may spend in a minute, at each gateway")
    create.add_argument(
        "--weight",
        metavar="N",
        type=int,
        default=1,
        help="its account's share of places that many ask for, beside others (default: 1)",
    )
    create.add_argument(
        "--expires", metavar="WHEN", help="30d or 12h from now, or the last day (UTC) on which it works: 2026-12-31"
    )
    listing = operator_command(keys, "list", _keys_list, "list keys, without the keys themselves")
    listing.add_argument("--account", metavar="ACCOUNT", help="only those of this account")
    revoke = operator_command(keys, "revoke", _keys_revoke, "revoke a key, at once")
    revoke.add_argument("key", metavar="NAME_OR_ID", help="the key's id, or its name (then all keys of that name)")

    credit = operator_command(commands, "credit", _credit, "give credit to an account, or take it back")
    _add_account(credit)
    credit.add_argument("amount", metavar="AMOUNT", help="credits, like 2.5; a negative amount is taken back")
    credit.add_argument("--id", metavar="ID", help="your own id of this payment: repeating it changes nothing")
    credit.add_argument("--memo", metavar="TEXT", default="", help="a note that the ledger keeps")

    ledger = commands.add_parser(
        "ledger", help="read and check the books", description="The double-entry ledger of a network."
    ).add_subparsers(metavar="COMMAND", required=True)
    balance = operator_command(ledger, "balance", _ledger_balance, "show balances")
    balance.add_argument("account", metavar="ACCOUNT", nargs="?", help="one account (default: all of the ledger)")
    history = operator_command(ledger, "history", _ledger_history, "show what moved an account's money, newest first")
    _add_account(history)
    history.add_argument("--limit", metavar="N", type=int, default=50, help="how many transfers (default: 50)")
    operator_command(ledger, "check", _ledger_check, "prove that the books add up; exit code 1 when they do not")

    classes = commands.add_parser(
        "classes",
        help="decide which model class a name means",
        description="A class is one exact set of weights, arithmetic and tokenizer. Names belong to the operator.",
    ).add_subparsers(metavar="COMMAND", required=True)
    operator_command(classes, "list", _classes_list, "list names, their classes, and offers that wait")
    for verb, run, help_text in (
        ("approve", _classes_approve, "let a class be served under a name"),
        ("withdraw", _classes_withdraw, "take a class from a name"),
    ):
        command = operator_command(classes, verb, run, help_text)
        command.add_argument("name", metavar="NAME", help="model name")
        command.add_argument("class_id", metavar="CLASS", help="class id, or its first 8 characters or more")

    nodes = operator_command(commands, "nodes", _nodes, "show how the nodes stand, and why work went elsewhere")
    nodes.add_argument("node", metavar="NODE", nargs="?", help="one node by its id, with every reason (default: all)")

    operator_command(commands, "status", _status, "show a running network: models, nodes, load")


def add_command(commands: Any, name: str, run: Callable[..., int], help_text: str, description: str) -> Any:
    command = commands.add_parser(
        name, help=help_text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def known_settings() -> frozenset[str]:
    """Every setting of every program: they may stand in one environment."""
    from gridmill.client import ClientSettings
    from gridmill.network.settings import NetworkSettings
    from gridmill.node.settings import NodeSettings

    return field_names(ClientSettings) | field_names(NetworkSettings) | field_names(NodeSettings)


def operator_command(commands: Any, name: str, run: Callable[..., int], help_text: str) -> Any:
    command = add_command(commands, name, run, help_text, help_text[0].upper() + help_text[1:] + ".")
    command.add_argument("--data", metavar="DIR", help="the network's data folder (default: ~/.gridmill)")
    command.add_argument("--database", metavar="URL", help="the network's PostgreSQL database, if it has one")
    command.add_argument("--json", action="store_true", help="print JSON, amounts in nanocredits")
    return command


def _add_account(command: Any) -> None:
    command.add_argument("account", metavar="ACCOUNT", help="id or name of the account, or of one of its keys")


# ---------------------------------------------------------------- accounts and keys


def _accounts_create(arguments: argparse.Namespace, environ: Environment) -> int:
    made = operate_on(arguments, environ, "accounts.create", name=arguments.name)
    return _say(
        arguments,
        made,
        f"{made['account_id']} ({made['name']}). A key for it: gridmill keys create NAME "
        f"--account {made['account_id']}",
    )


def _accounts_list(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "accounts.list")
    return _show(
        arguments,
        rows,
        ("ID", "NAME", "AVAILABLE", "HELD", "KEYS", "CREATED", "FROZEN"),
        [
            (
                r["account_id"],
                r["name"],
                in_credits(r["available_nanocredits"]),
                in_credits(r["held_nanocredits"]),
                str(r["keys"]),
                _moment(r["created_seconds"]),
                _moment(r["frozen_seconds"]),
            )
            for r in rows
        ],
        "No accounts yet: `gridmill keys create NAME` makes one with a key.",
    )


def _accounts_show(arguments: argparse.Namespace, environ: Environment) -> int:
    from gridmill.client import table

    shown = operate_on(arguments, environ, "accounts.show", account=arguments.account)
    if arguments.json:
        print(json.dumps(shown))
        return 0
    print(f"{shown['account_id']} ({shown['name']}), since {_moment(shown['created_seconds'])}")
    if shown["frozen_seconds"] is not None:
        print(f"frozen since {_moment(shown['frozen_seconds'])}")
    print(f"{in_credits(shown['available_nanocredits'])} credits, and {in_credits(shown['held_nanocredits'])} held")
    if shown["keys"]:
        print("\n" + table(_KEY_COLUMNS, [_key_cells(row) for row in shown["keys"]]))
    if shown["nodes"]:
        cells: list[tuple[str, ...]] = [
            (n["node_id"], in_credits(n["earned_nanocredits"]), n["key_id"], _moment(n["last_seen_seconds"]))
            for n in shown["nodes"]
        ]
        print("\n" + table(("NODE", "EARNED", "JOINED WITH", "LAST SEEN"), cells))
    return 0


def _accounts_freeze(arguments: argparse.Namespace, environ: Environment) -> int:
    row = operate_on(arguments, environ, f"accounts.{arguments.verb}", account=arguments.account)
    state = "is frozen: none of its keys works" if row["frozen_seconds"] is not None else "is not frozen: its keys work"
    return _say(arguments, row, f"{row['account_id']} ({row['name']}) {state}.")


def _keys_create(arguments: argparse.Namespace, environ: Environment) -> int:
    made = operate_on(
        arguments,
        environ,
        "keys.create",
        name=arguments.name,
        scope=",".join(arguments.scope or ["inference"]),
        account=arguments.account,
        budget_nanocredits=_amount(arguments.budget),
        requests_per_minute=arguments.requests_per_minute,
        cost_per_minute_nanocredits=_amount(arguments.cost_per_minute),
        expires=arguments.expires,
        weight=arguments.weight,
    )
    if arguments.json:
        print(json.dumps(made))
    else:
        import sys

        print(made["api_key"])
        print(
            f"This is the only time the key is shown ({made['key_id']}, {made['scope']}, "
            f"of {'' if arguments.account else 'the new account '}{made['account_id']}).",
            file=sys.stderr,
        )
    return 0


def _keys_list(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "keys.list", account=arguments.account)
    cells = [_key_cells(row) for row in rows]
    return _show(arguments, rows, _KEY_COLUMNS, cells, "No keys yet: `gridmill keys create NAME` makes one.")


_KEY_COLUMNS = ("ID", "NAME", "ACCOUNT", "SCOPE", "LIMITS", "SPENT OR HELD", "CREATED", "EXPIRES", "REVOKED")


def _key_cells(row: dict[str, Any]) -> tuple[str, ...]:
    limits = []
    if row["requests_per_minute"] is not None:
        limits.append(f"{row['requests_per_minute']} requests/min")
    if row["cost_per_minute_nanocredits"] is not None:
        limits.append(f"{in_credits(row['cost_per_minute_nanocredits'])} credits/min")
    if row["weight"] != 1:
        limits.append(f"weight {row['weight']}")
    budget = row["budget_nanocredits"]
    spent = "" if budget is None else f"{in_credits(row['committed_nanocredits'])} of {in_credits(budget)}"
    return (
        *(row["key_id"], row["name"], row["account_name"], row["scope"], ", ".join(limits), spent),
        *(_moment(row[when]) for when in ("created_seconds", "expires_seconds", "revoked_seconds")),
    )


def _keys_revoke(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "keys.revoke", key=arguments.key)
    return _say(arguments, rows, "\n".join(f"Revoked {row['key_id']} ({row['name']})." for row in rows))


# ---------------------------------------------------------------- money


def _credit(arguments: argparse.Namespace, environ: Environment) -> int:
    done = operate_on(
        arguments,
        environ,
        "credit",
        account=arguments.account,
        amount_nanocredits=_amount(arguments.amount),
        id=arguments.id,
        memo=arguments.memo,
    )
    before = "That was done before. " if done["repeated"] else ""
    return _say(arguments, done, f"{before}{done['name']} has {in_credits(done['available_nanocredits'])} credits.")


def _ledger_balance(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "ledger.balance", account=arguments.account)
    if isinstance(rows, dict):
        held = in_credits(rows["held_nanocredits"])
        return _say(
            arguments, rows, f"{rows['name']} has {in_credits(rows['available_nanocredits'])} credits, {held} held."
        )
    cells = [(row["ledger_account"], in_credits(row["balance_nanocredits"])) for row in rows]
    return _show(arguments, rows, ("LEDGER ACCOUNT", "CREDITS"), cells, "Nothing has been credited or charged yet.")


def _ledger_history(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "ledger.history", account=arguments.account, limit=arguments.limit)
    return _show(
        arguments,
        rows,
        ("WHEN", "KIND", "AVAILABLE", "HELD", "TRANSFER", "MEMO"),
        [
            (
                _moment(r["at_ms"] // 1000),
                r["kind"],
                _change(r["available_nanocredits"]),
                _change(r["held_nanocredits"]),
                r["transfer_id"],
                r["memo"],
            )
            for r in rows
        ],
        "Nothing has moved this account's money yet.",
    )


def _ledger_check(arguments: argparse.Namespace, environ: Environment) -> int:
    found = operate_on(arguments, environ, "ledger.check")
    problems = found["problems"]
    counts = f"{found['transfers']} transfers with {found['entries']} entries, {found['accounts']} accounts"
    verdict = f"{len(problems)} problems in" if problems else "The books add up:"
    _say(arguments, found, "\n".join([*problems, f"{verdict} {counts}."]))
    return EXIT_FAILED if problems else 0


# ---------------------------------------------------------------- classes and status


def _classes_list(arguments: argparse.Namespace, environ: Environment) -> int:
    rows = operate_on(arguments, environ, "classes.list")
    return _show(
        arguments,
        rows,
        ("NAME", "CLASS", "APPROVED", "OFFERED BY"),
        [(r["name"], r["class_id"][:16], "yes" if r["approved"] else "waits", r["owner"]) for r in rows],
        "No classes yet: they appear when a node offers one.",
    )


def _classes_approve(arguments: argparse.Namespace, environ: Environment) -> int:
    made = operate_on(arguments, environ, "classes.approve", name=arguments.name, class_id=arguments.class_id)
    return _say(arguments, made, f"{made['name']} may now be served as class {made['class_id'][:16]}.")


def _classes_withdraw(arguments: argparse.Namespace, environ: Environment) -> int:
    made = operate_on(arguments, environ, "classes.withdraw", name=arguments.name, class_id=arguments.class_id)
    return _say(arguments, made, f"{made['name']} no longer means class {made['class_id'][:16]}.")


def _status(arguments: argparse.Namespace, environ: Environment) -> int:
    from gridmill.client import table

    state = operate_on(arguments, environ, "status")
    if arguments.json:
        print(json.dumps(state))
        return 0
    if not state["running"]:
        print(f"No network runs on {data_folder(arguments, environ)}: `gridmill up` or `gridmill network` starts one.")
        return EXIT_FAILED
    print(f"{state['base_url']}: {state['works_running']} running, {state['requests_waiting']} waiting")
    print(f"network key: {state['network_key']}\n")
    print(
        table(
            ("MODEL", "CLASS", "NODES", "RUNNING", "SLOTS"),
            [
                (m["name"], m["class_id"][:8], str(m["nodes"]), str(m["in_flight"]), str(m["slots"]))
                for m in state["models"]
            ],
        )
    )
    print()
    print(
        table(
            ("NODE", "MODELS", "PRICE", "RUNNING", "TOKENS/S", "KV PAGES", "ROUND TRIP", ""),
            [
                (
                    n["node_id"],
                    ", ".join(n["models"]),
                    ", ".join("/".join(map(str, price)) if any(price) else "free" for price in n["prices_nanocredits"]),
                    f"{n['running']}/{n['slots']}",
                    f"{n['tokens_per_second']:.0f}",
                    f"{n['kv_pages_used']}/{n['kv_pages_total']}",
                    f"{n['round_trip_seconds'] * 1000:.1f} ms",
                    "draining" if n["draining"] else "",
                )
                for n in state["nodes"]
            ],
        )
    )
    return 0


def _nodes(arguments: argparse.Namespace, environ: Environment) -> int:
    from gridmill.client import table

    found = operate_on(arguments, environ, "nodes", node=arguments.node or "")
    if arguments.json:
        print(json.dumps(found))
        return 0
    if not found:
        print("No node is here, or no network runs: `gridmill status` says which.")
        return EXIT_FAILED
    rows: list[tuple[str, ...]] = []
    for node in found:
        for one in node["classes"]:
            seen, demand = one["measured"], one["demand"]
            lost = [reason["reason"] for reason in demand["lost"] if reason["reason"] != "not drawn"]
            rows.append(
                (
                    node["node_id"],
                    ", ".join(one["names"]),
                    one["state"],
                    f"{one['in_flight']}/{one['limit']}/{one['slots']}",
                    _number(seen["first_token_seconds"], "{:.3f} s"),
                    _number(seen["prefill_tokens_per_second"], "{:.0f}"),
                    _number(seen["decode_tokens_per_second"], "{:.0f}"),
                    f"{one['availability']:.0%}",
                    _number(demand["won_share"], "{:.1%}"),
                    ", ".join(lost[:2]),
                )
            )
    heads = ("NODE", "MODELS", "STATE", "RUNNING/LIMIT/SLOTS", "FIRST TOKEN", "READS/S", "WRITES/S")
    print(table((*heads, "AVAILABLE", "WON", "LOST MOSTLY"), rows))
    if arguments.node:
        for node in found:
            for one in node["classes"]:
                print(
                    f"\n{', '.join(one['names'])}: won {one['demand']['won']} of {one['demand']['decisions']} decisions"
                )
                reasons: list[tuple[str, ...]] = [
                    (r["reason"], str(r["count"]), r["meaning"]) for r in one["demand"]["lost"]
                ]
                if reasons:
                    print(table(("REASON", "COUNT", "MEANING"), reasons))
    return 0


def _number(value: float | None, shape: str) -> str:
    return "–" if value is None else shape.format(value)


# ---------------------------------------------------------------- how they run and what they show


def operate_on(arguments: argparse.Namespace, environ: Environment, command: str, **values: Any) -> Any:
    from gridmill.network.operator import operate
    from gridmill.network.settings import load_network_settings

    folder = data_folder(arguments, environ)

    def database() -> str | None:
        flags = {"data": folder, "database": arguments.database}
        return load_network_settings(flags, environ, known_settings()).database

    if not folder.is_dir() and database() is None:
        raise SettingsError(f"{folder} does not exist: give the network's --data folder (or start one: `gridmill up`)")
    return operate(folder, command, database=database, **values)


def data_folder(arguments: argparse.Namespace, environ: Environment) -> Path:
    from gridmill.network.settings import DEFAULT_DATA

    return Path(arguments.data or environ.get("GRIDMILL_DATA") or DEFAULT_DATA).expanduser()


def _show(
    arguments: argparse.Namespace, raw: Any, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], empty: str
) -> int:
    from gridmill.client import table

    return _say(arguments, raw, table(header, list(rows)) if rows else empty)


def _say(arguments: argparse.Namespace, raw: Any, sentence: str) -> int:
    print(json.dumps(raw) if arguments.json else sentence)
    return 0


def _amount(text: str | None) -> int | None:
    from gridmill.network.credits import parse_credits

    try:
        return None if text is None else parse_credits(text)
    except ValueError as problem:
        raise SettingsError(str(problem)) from problem


def in_credits(nanocredits: int) -> str:
    from gridmill.network.credits import show_credits

    return show_credits(nanocredits)


def _change(nanocredits: int) -> str:
    return f"{'+' if nanocredits > 0 else ''}{in_credits(nanocredits)}" if nanocredits else ""


def _moment(seconds: int | None) -> str:
    import datetime

    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
