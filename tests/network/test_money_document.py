"""docs/money.md shows what the ledger does: its tables are the entries of flows that are really played."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from gridmill.network import ledger

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "money.md"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("print_money", ROOT / "scripts" / "print_money.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_flows_are_up_to_date() -> None:
    assert PAGE.read_text() == script().page_with_flows(PAGE.read_text()), "run scripts/print_money.py"


def test_every_flow_is_on_the_page() -> None:
    assert set(re.findall(r"<!-- generated: (\w+) -->", PAGE.read_text())) == set(script().FLOWS)


def test_every_table_of_entries_adds_up_to_zero() -> None:
    for name in script().FLOWS:
        amounts = re.findall(r"\| ([+−])(\d+)(?:\.(\d+))? \|$", script().flow(name), flags=re.M)
        nanocredits = [
            (1 if sign == "+" else -1) * (int(whole) * 10**9 + int(places.ljust(9, "0") or 0))
            for sign, whole, places in amounts
        ]
        assert sum(nanocredits) == 0, name
        assert nanocredits or name in ("free_work", "too_poor")


def test_every_account_of_the_chart_is_explained() -> None:
    page = PAGE.read_text()
    assert ledger.__doc__ is not None
    for name in re.findall(r"(?:user|provider|escrow|network|audit|failover|rail|fx):[\w:/]+|\bloss\b", ledger.__doc__):
        assert f"`{name}`" in page, f"docs/money.md does not explain {name}"
