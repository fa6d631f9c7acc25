"""`gridmill COMMAND`: each command is a few lines here that call an `app` or `operator` function.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 the network cannot be reached or refuses, 4 the model
cannot be loaded, 130 interrupted. Heavy modules are imported by the command that needs them, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import signal
import sys
import types
import typing
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from gridmill import __version__
from gridmill.operator_cli import EXIT_FAILED, EXIT_USAGE, add_command, add_operator_commands, known_settings
from gridmill.receipts_cli import add_receipts_commands
from gridmill.settings_loader import SettingsError, field_names

EXIT_NETWORK, EXIT_MODEL, EXIT_INTERRUPTED = 3, 4, 130


def main(argv: list[str] | None = None) -> int:
    """Parses, runs, and turns every expected failure into one sentence on stderr and an exit code."""
    try:
        return _main(argv)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return EXIT_INTERRUPTED


def _main(argv: list[str] | None) -> int:
    # The one place that reads the environment for all programs; settings get it as an argument.
    import os

    arguments = build_parser().parse_args(argv)
    from gridmill.network.control import ControlError
    from gridmill.network.store import StoreUnusable
    from gridmill.wire.identity import IdentityError

    try:
        return int(arguments.run(arguments, dict(os.environ)) or 0)
    except SettingsError as problem:
        return _say(problem, EXIT_USAGE)
    except (ControlError, StoreUnusable, IdentityError, OSError) as problem:
        return _say(problem, EXIT_FAILED)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags; the docs test walks through it."""
    from gridmill.client import ClientSettings
    from gridmill.network.settings import NetworkSettings
    from gridmill.node.settings import NodeSettings

    parser = argparse.ArgumentParser(
        prog="gridmill",
        description="Pools GPUs that belong to different owners into one OpenAI-compatible inference service.",
        epilog="Start here: `gridmill up`, then `gridmill chat` in another terminal.",
    )
    parser.add_argument("--version", action="version", version=f"gridmill {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    up = add_command(
        commands,
        "up",
        _up,
        "start a network and one node on this machine",
        "Starts a network and one node together, with nothing to configure; prints the URL, a key and a curl line.\n"
        "Without --model it serves gridmill/demo, a toy that ships inside the package.",
    )
    # The node of `up` is on this machine and known to its network: it needs no token, and its link no TLS.
    _add_settings(up, NetworkSettings, leave_out={"tls_certificate", "tls_key"})
    only_node = {"network", "exit_with_parent", "log_json", "join_token", "network_key", "ca_file", "insecure"}
    _add_settings(up, NodeSettings, leave_out=field_names(NetworkSettings) | only_node)

    network = add_command(
        commands,
        "network",
        _network,
        "start a network that nodes can join",
        "Starts the gateway that users call and nodes join. Keys: `gridmill keys create NAME`.",
    )
    _add_settings(network, NetworkSettings)

    node = add_command(
        commands,
        "node",
        _node,
        "join a network and serve a model",
        "Joins the network at --network and serves --model. Dials out only: no port has to be opened.\n"
        "Example: gridmill node --network http://127.0.0.1:8420 --model gridmill/demo",
    )
    _add_settings(node, NodeSettings)

    chat = add_command(
        commands,
        "chat",
        _chat,
        "chat with a model in the terminal",
        "Streams a chat. With a QUESTION it answers that one and ends.",
    )
    chat.add_argument("question", nargs="?", metavar="QUESTION", help="ask this and end")
    _add_settings(chat, ClientSettings)
    models = add_command(
        commands, "models", _models, "list the models that a network serves", "Lists what can be asked."
    )
    _add_settings(
        models, ClientSettings, leave_out={"model", "system", "temperature", "max_tokens", "min_tokens", "seed"}
    )

    quote = add_command(
        commands,
        "quote",
        _quote,
        "say what a request would cost",
        "Shows what would be held for a request and what it costs when all of its tokens are used. Asks no node.",
    )
    quote.add_argument("model", metavar="MODEL", help="model name")
    count = quote.add_mutually_exclusive_group(required=True)
    count.add_argument("--prompt", metavar="TEXT", help="count the tokens of this, as one chat message")
    count.add_argument("--input-tokens", metavar="N", type=int, help="a prompt of so many tokens")
    _add_settings(quote, ClientSettings, leave_out={"model", "system", "temperature", "min_tokens", "seed"})

    sim = add_command(
        commands,
        "sim",
        _sim,
        "say what a fleet would do, without one",
        "Simulates a network and its nodes in virtual time, on this machine alone: the real programs on lines and\n"
        "clocks of their own, chats as load, and nodes that die, drain, hang and come back.\n"
        "Example: gridmill sim --nodes 50 --churn 0.2",
    )
    sim.add_argument("--nodes", type=int, default=20, metavar="N", help="nodes, of four speeds (default: 20)")
    sim.add_argument(
        "--churn",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the nodes to which something happens each minute, like 0.2 (default: 0.2)",
    )
    sim.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="NUMBER",
        help="how long requests come, in virtual seconds; the last ones run to their end (default: 60)",
    )
    sim.add_argument(
        "--rate", type=float, default=0.0, metavar="NUMBER", help="requests a second (default: 60 %% load)"
    )
    sim.add_argument("--slots", type=int, default=4, metavar="N", help="requests at once on a node (default: 4)")
    sim.add_argument(
        "--tokens-per-second",
        type=float,
        default=20.0,
        metavar="NUMBER",
        help="how fast one stream of the slowest nodes is (default: 20)",
    )
    sim.add_argument("--seed", type=int, default=0, metavar="N", help="another seed is another day (default: 0)")
    sim.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")

    add_operator_commands(commands)
    add_receipts_commands(commands)
    return parser


# ---------------------------------------------------------------- the long-running commands


def _up(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.network.settings import NetworkSettings, load_network_settings
    from gridmill.node.settings import NodeSettings, load_node_settings
    from gridmill.up import NodeFailed, run_up

    flags = _flags(arguments)
    network_flags = {name: value for name, value in flags.items() if name in field_names(NetworkSettings)}
    if network_flags.get("log_level") is None and "GRIDMILL_LOG_LEVEL" not in environ:
        network_flags["log_level"] = "warning"  # one person at one terminal: the address and the key come first
    settings = load_network_settings(network_flags, environ, known_settings())
    node_flags = {name: value for name, value in flags.items() if name not in field_names(NetworkSettings)}
    config = settings.config or (settings.data / "gridmill.toml")
    if config.exists():
        node_flags["config"] = config
    node_flags["data"] = settings.data / "node"
    node_flags["log_level"] = settings.log_level
    node_flags["log_json"] = settings.json
    # Checked here, so that a misspelt setting is one sentence instead of a child that dies.
    load_node_settings({**node_flags, "network": "http://127.0.0.1"}, environ, known_settings())
    if settings.tls_certificate is not None:
        raise SettingsError("`gridmill up` does not end TLS: start `gridmill network` and `gridmill node` instead")
    _start_log(settings.log_level, as_json=settings.json)

    def ready(facts: dict[str, Any]) -> None:
        if settings.json:
            print(json.dumps(facts), flush=True)
            return
        print(
            f"Gridmill is up.\n\n  API    {facts['base_url']}\n  key    {facts['api_key']}\n  model  {facts['model']}"
            f"{_remark(facts['model'], node_flags.get('engine'))}\n\n"
            f"Ask it:  gridmill chat{_data_hint(settings.data)}\n"
            f"or:      curl {facts['base_url']}/chat/completions -H 'authorization: Bearer {facts['api_key']}' \\\n"
            "           -H 'content-type: application/json' \\\n"
            f'           -d \'{{"model": "{facts["model"]}", "messages": '
            '[{"role": "user", "content": "What is Gridmill?"}]}\'\n\n'
            "Ctrl-C stops both.",
            flush=True,
        )

    if not settings.json:
        print("Starting a network and a node …", file=sys.stderr)
    try:
        return _until_signal(
            lambda stop: run_up(settings, _node_arguments(node_flags, NodeSettings), ready=ready, stop=stop)
        )
    except NodeFailed as failed:
        return _say(failed, failed.exit_code or EXIT_FAILED)


def _remark(model: str, engine: object) -> str:
    if engine in ("echo", "mock"):
        return "  (echo: the text is made up, only the machinery is real)"
    return "  (a toy that only knows Gridmill)" if model == "gridmill/demo" else ""


def _network(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.network.app import run_network
    from gridmill.network.operator import Operations
    from gridmill.network.settings import load_network_settings

    settings = load_network_settings(_flags(arguments), environ, known_settings())
    _start_log(settings.log_level, as_json=settings.json)

    async def ready(facts: dict[str, Any], operations: Operations) -> None:
        if settings.json:
            print(json.dumps(facts), flush=True)
        else:
            hint = _data_hint(settings.data)
            print(
                f"The network is ready at {facts['base_url']}\n"
                f"  a key for a user:    gridmill keys create NAME{hint}\n"
                f"  a node joins with:   gridmill node --network {facts['base_url'].removesuffix('/v1')} --model NAME"
                + (
                    f" --join-token TOKEN\n  a token for a node:  gridmill keys create NAME --scope node{hint}"
                    if settings.invite_only
                    else ""
                ),
                flush=True,
            )
            if not settings.on_loopback and settings.tls_certificate is None:
                print(
                    "Without TLS keys and prompts cross the line in plain text: give --tls-certificate and --tls-key, "
                    "or put a proxy in front and tell its address with --public-url.",
                    file=sys.stderr,
                )

    return _until_signal(lambda stop: run_network(settings, ready=ready, stop=stop))


def _node(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.node.app import run_node
    from gridmill.node.settings import load_node_settings

    settings = load_node_settings(_flags(arguments), environ, known_settings())
    _start_log(settings.log_level, as_json=settings.json if settings.log_json is None else settings.log_json)

    def ready(facts: dict[str, Any]) -> None:
        if settings.json:
            print(json.dumps(facts), flush=True)
        else:
            print(f"Serving {facts['model']} on {facts['base_url']} as {facts['node_id']}. Ctrl-C stops.", flush=True)

    return _until_signal(lambda stop: run_node(settings, ready=ready, stop=stop), quiet=settings.exit_with_parent)


def _sim(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import msgspec

    from gridmill.sim.fleet import Plan, simulate

    if not (1 <= arguments.nodes <= 10_000 and 0 <= arguments.churn <= 60 and 0 < arguments.seconds <= 86_400):
        return _say("--nodes is 1 to 10000, --churn 0 to 60, --seconds up to 86400", EXIT_USAGE)
    if arguments.slots < 1 or arguments.tokens_per_second <= 0 or arguments.rate < 0:
        return _say("--slots and --tokens-per-second are above 0, --rate not below it", EXIT_USAGE)
    logging.disable(logging.CRITICAL)  # what simulated programs warn of is no news from this one
    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__struct_fields__})
    fleet = simulate(plan, lambda line: None if arguments.json else print(line, file=sys.stderr, flush=True))
    print(msgspec.json.encode(fleet).decode() if arguments.json else "\n".join(fleet.sentences()))
    return 0


def _until_signal(program: Callable[[asyncio.Event], Coroutine[Any, Any, int]], *, quiet: bool = False) -> int:
    """Runs a program until it ends. The first Ctrl-C or SIGTERM asks it to drain, the second cancels it."""

    async def run() -> int:
        stop = asyncio.Event()
        task = asyncio.ensure_future(program(stop))

        def asked() -> None:
            if stop.is_set():
                task.cancel()
            else:
                stop.set()
                if quiet:
                    return  # the program that started this one has said it
                with contextlib.suppress(OSError):  # whoever read our log may have gone first
                    print(
                        "Stopping: running answers go on elsewhere or to their end; Ctrl-C again stops at once.",
                        file=sys.stderr,
                        flush=True,
                    )

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, asked)
        return await task

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


# ---------------------------------------------------------------- talking to a network


def _chat(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.client import load_client_settings, run_chat

    question = arguments.question
    del arguments.question
    settings = load_client_settings(_flags(arguments), environ, known_settings())
    return _client(run_chat(settings, question, sys.stdout))


def _models(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.client import load_client_settings, run_models

    return _client(run_models(load_client_settings(_flags(arguments), environ, known_settings()), sys.stdout))


def _quote(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from gridmill.client import load_client_settings, run_quote
    from gridmill.network.credits import show_credits

    given = {"prompt": arguments.prompt, "input_tokens": arguments.input_tokens}
    del arguments.prompt, arguments.input_tokens
    settings = load_client_settings(_flags(arguments), environ, known_settings())
    counted = {name: value for name, value in given.items() if value is not None}
    return _client(run_quote(settings, counted, show_credits, sys.stdout))


def _client(work: Coroutine[Any, Any, int]) -> int:
    import aiohttp

    from gridmill.client import ClientError

    try:
        return asyncio.run(work)
    except ClientError as problem:
        return _say(problem, EXIT_FAILED)
    except (aiohttp.ClientError, TimeoutError) as problem:
        return _say(f"the network cannot be reached: {problem or type(problem).__name__}", EXIT_NETWORK)


# ---------------------------------------------------------------- flags from settings


def _add_settings(parser: argparse.ArgumentParser, cls: Any, leave_out: typing.Collection[str] = ()) -> None:
    """One flag per field of a settings class; the loader reads and checks the text."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in leave_out or field.metadata.get("help", "").startswith("(internal)"):
            if field.name not in leave_out:
                parser.add_argument("--" + field.name.replace("_", "-"), **_internal(hints[field.name]))
            continue
        hint, default = hints[field.name], field.default
        options: dict[str, Any] = {"default": None, "help": _help(field.metadata.get("help", ""), default)}
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(inner) == 1:
            hint = inner[0]
        if hint is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            options["metavar"] = "{" + ",".join(str(choice) for choice in typing.get_args(hint)) + "}"
        else:
            named = {Path: "PATH", int: "N", float: "NUMBER"}
            options["metavar"] = "DIR" if field.name == "data" else named.get(hint, "TEXT")
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _internal(hint: Any) -> dict[str, Any]:
    """A flag that programs give to programs: it works and is not shown."""
    if hint is bool:
        return {"action": "store_true", "default": None, "help": argparse.SUPPRESS}
    return {"action": argparse.BooleanOptionalAction, "default": None, "help": argparse.SUPPRESS}


def _help(text: str, default: Any) -> str:
    if default in (None, False, dataclasses.MISSING) or "default" in text:
        return text.replace("%", "%%")
    shown = str(default).replace(str(Path.home()), "~")
    return f"{text} (default: {shown})".replace("%", "%%")


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: value for name, value in vars(arguments).items() if name != "run" and value is not None}


def _node_arguments(flags: Mapping[str, object], cls: Any) -> list[str]:
    """The node's flags as its child process gets them."""
    known = field_names(cls)
    made: list[str] = []
    for name, value in flags.items():
        if name not in known or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            made += [f"--{flag}", str(value)]
    return made


def _data_hint(data: Path) -> str:
    from gridmill.network.settings import DEFAULT_DATA

    return "" if data == DEFAULT_DATA else f" --data '{data}'"


def _say(problem: object, code: int) -> int:
    print(f"gridmill: {problem}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- the log


_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _LineFormatter(logging.Formatter):
    """One event a line; what the event knows follows as key=value, or the whole as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _PLAIN and value is not None}
        trouble = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            fields = {
                "time_seconds": round(record.created, 3),
                "level": record.levelname.lower(),
                "logger": record.name,
                "event": record.getMessage(),
                **extra,
            }
            return json.dumps({**fields, **({"trouble": trouble} if trouble else {})}, default=str)
        facts = "".join(f" {name}={value}" for name, value in extra.items())
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {record.getMessage()}{facts}"
        return line + (f"\n{trouble}" if trouble else "")


def _start_log(level: str, *, as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(as_json=as_json))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gridmill").setLevel(level.upper())
