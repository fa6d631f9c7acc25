"""One frozen settings object per program, in layers: flags > environment (`GRIDMILL_…`) > TOML table > defaults.

1. A key that no layer knows is refused by name, with the nearest known one: a misspelt setting never passes in silence.
2. Every error names the place that the value came from, in the spelling that the person used there.
3. This file reads no environment and no clock: `environ` is an argument, and a program's `settings.py` hands it in.

A settings class is a frozen dataclass whose fields are str, int, float, bool, Path, Literal[...], a tuple of one of
these, or one of these with None. `setting(default, help=…, parse=…)` adds a sentence for people and a reader of text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Settings = TypeVar("Settings", bound=DataclassInstance)
else:
    Settings = TypeVar("Settings")

ENVIRONMENT_PREFIX = "GRIDMILL_"
TABLES = ("network", "node")  # the tables of gridmill.toml; each program reads its own and knows that the others exist
TOML_BYTES_MAX = 1 << 20  # a settings file is written by hand; anything larger was given by mistake


class SettingsError(ValueError):
    """A setting that cannot be used. The message is one sentence that names the setting and where it was given."""


def load(
    cls: type[Settings],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    toml_path: Path | None,
    table: str,
    known_elsewhere: Collection[str] = (),
    toml_required: bool = False,
) -> Settings:
    """Builds `cls` from its layers.

    `flags`: field name → value, as argparse gives them; None means not given. `environ`: `GRIDMILL_<FIELD>` or,
    stronger, `GRIDMILL_<TABLE>_<FIELD>`. `toml_path`: absent files are skipped unless `toml_required`.
    `known_elsewhere`: field names of the other programs, which may stand in the same environment. Raises SettingsError.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    layers = [
        _from_toml(toml_path, table, fields, required=toml_required),
        _from_environment(environ, table, fields, known_elsewhere),
        _from_flags(flags, fields),
    ]
    for layer in layers:
        for name, (raw, source, folder) in layer.items():
            values[name] = _converted(raw, hints[name], fields[name], source, folder)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        name = missing[0]
        raise SettingsError(
            f"{_flag(name)} is required (or {ENVIRONMENT_PREFIX}{name.upper()}, or `{name}` under [{table}])"
        )
    try:
        return cls(**values)
    except SettingsError:
        raise
    except ValueError as problem:  # raised by __post_init__, which knows what fits together
        raise SettingsError(str(problem)) from problem


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    parse: Callable[[str], Any] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with a sentence for `--help` and, where needed, a reader of its text (raising ValueError).

    A `secret` stays out of the object's repr, and so out of logs.
    """
    metadata = {"help": help, "parse": parse}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata, repr=not secret)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def field_names(cls: type[DataclassInstance]) -> frozenset[str]:
    """The names that this settings class knows, to be passed as another program's `known_elsewhere`."""
    return frozenset(field.name for field in dataclasses.fields(cls) if field.init)


def toml_path_for(
    flags: Mapping[str, object], environ: Mapping[str, str], default_data: Path, *, file_name: str = "gridmill.toml"
) -> tuple[Path, bool]:
    """Which TOML file to read, and whether it must exist: `--config FILE` must, `DATA/gridmill.toml` need not."""
    chosen = flags.get("config") or environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    if chosen:
        return Path(str(chosen)).expanduser(), True
    data = flags.get("data") or environ.get(ENVIRONMENT_PREFIX + "DATA") or default_data
    return Path(str(data)).expanduser() / file_name, False


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from what people write: `8GiB`, `8G` (both 2**30), `8GB` (10**9), `512m`, `1000`. Raises ValueError."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        raise ValueError(f"{text!r} is no size; write it like 8GiB, 512MB or 1000000")
    number, unit, binary = matched.groups()
    power = " kmgt".index(unit.lower() or " ")
    decimal = not binary and unit != "" and text.strip().lower().endswith("b")
    return int(float(number) * (1000 if decimal else 1024) ** power)


# ---------------------------------------------------------------- one layer each: name → (raw, where it stood, folder)

_Layer = dict[str, tuple[object, str, Path | None]]


def _from_flags(flags: Mapping[str, object], fields: Mapping[str, Any]) -> _Layer:
    layer: _Layer = {}
    for name, value in flags.items():
        if value is None:
            continue
        if name not in fields:
            raise SettingsError(f"{_flag(name)} is no setting of this program{_nearest(name, fields, _flag)}")
        layer[name] = (value, _flag(name), None)
    return layer


def _from_environment(
    environ: Mapping[str, str], table: str, fields: Mapping[str, Any], known_elsewhere: Collection[str]
) -> _Layer:
    layer: _Layer = {}
    others = {other for other in TABLES if other != table}
    for variable in sorted(environ, key=len):  # the longer name, with the table in it, comes later and wins
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        whole = variable[len(ENVIRONMENT_PREFIX) :].lower()
        name = whole if whole in fields else whole.removeprefix(f"{table}_")
        if name in fields:
            layer[name] = (environ[variable], variable, None)
        elif whole not in known_elsewhere and not any(whole.startswith(f"{other}_") for other in others):
            nearest = _nearest(name, fields, lambda known: ENVIRONMENT_PREFIX + known.upper())
            raise SettingsError(f"the environment variable {variable} is no setting{nearest}")
    return layer


def _from_toml(path: Path | None, table: str, fields: Mapping[str, Any], *, required: bool) -> _Layer:
    if path is None:
        return {}
    try:
        if path.stat().st_size > TOML_BYTES_MAX:
            raise SettingsError(f"{path} is over {TOML_BYTES_MAX} bytes, which is no settings file")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise SettingsError(f"the settings file {path} does not exist") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise SettingsError(f"the settings file {path} cannot be read: {problem}") from problem
    tables = {table, *TABLES}
    for key, value in document.items():
        if key not in tables:
            hint = f"; put it under [{table}]" if key in fields else _nearest(key, tables, lambda known: f"[{known}]")
            raise SettingsError(f"`{key}` in {path} is no table of settings{hint}")
        if not isinstance(value, dict):
            raise SettingsError(f"`{key}` in {path} must be a table, [{key}]")
    layer: _Layer = {}
    for key, value in document.get(table, {}).items():
        name = key.replace("-", "_")
        source = f"`{key}` under [{table}] in {path}"
        if name not in fields:
            raise SettingsError(f"{source} is no setting{_nearest(name, fields, str)}")
        layer[name] = (value, source, path.parent)
    return layer


# ---------------------------------------------------------------- values


def _converted(raw: object, hint: Any, field: Any, source: str, folder: Path | None) -> Any:
    parse = field.metadata.get("parse") if field.metadata else None
    if parse is not None and isinstance(raw, str):
        try:
            return parse(raw)
        except ValueError as problem:
            raise SettingsError(f"{source}: {problem}") from problem
    try:
        return _as_type(raw, hint, folder)
    except ValueError as problem:
        raise SettingsError(f"{source} {problem}, not {raw!r}") from None


_TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _as_type(raw: object, hint: Any, folder: Path | None) -> Any:
    """`raw` (text, or what TOML or argparse made of it) as `hint`. Raises ValueError("must be …")."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if raw is None or (raw == "" and str not in options):
            return None
        return _as_type(raw, options[0], folder)
    if origin is Literal:
        choices = typing.get_args(hint)
        if raw not in choices:
            raise ValueError("must be one of " + ", ".join(str(choice) for choice in choices))
        return raw
    if origin is tuple:
        items = [part.strip() for part in raw.split(",") if part.strip()] if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)):
            raise ValueError("must be a list")
        return tuple(_as_type(item, typing.get_args(hint)[0], folder) for item in items)
    if hint is bool:
        truth = raw if isinstance(raw, bool) else _TRUTHS.get(str(raw).lower())
        if truth is None:
            raise ValueError("must be true or false")
        return truth
    if hint is int:
        return _as_int(raw)
    if hint is float:
        return _as_float(raw)
    if hint is Path:
        if not isinstance(raw, (str, Path)) or str(raw) == "":
            raise ValueError("must be a path")
        path = Path(raw).expanduser()
        return folder / path if folder is not None else path
    if hint is str:
        if not isinstance(raw, str):
            raise ValueError("must be text")
        return raw
    raise TypeError(f"settings cannot be of type {hint}")


def _as_int(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str):
        try:
            return int(raw.replace("_", ""))
        except ValueError:
            pass  # said below, with the text that was given
    raise ValueError("must be a whole number")


def _as_float(raw: object) -> float:
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        number = float(raw)
    else:
        try:
            number = float(str(raw))
        except ValueError:
            raise ValueError("must be a number") from None
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(name: str, known: Collection[str], spelled: Callable[[str], str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {spelled(close[0])}?" if close else ""
