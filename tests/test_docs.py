"""Documentation is executed: what it says of commands, files and messages is what there is."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_what_the_commands_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert (ROOT / "docs" / "commands.md").read_text() == script("make_docs").commands_page(), "run `make docs`"


def test_every_setting_has_a_sentence() -> None:
    import dataclasses

    from gridmill.client import ClientSettings
    from gridmill.network.settings import NetworkSettings
    from gridmill.node.settings import NodeSettings

    for settings in (ClientSettings, NetworkSettings, NodeSettings):
        for field in dataclasses.fields(settings):
            assert field.metadata.get("help"), f"{settings.__name__}.{field.name} has no help text"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|docs|bench|scripts)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_pages_show_exist(page: Path) -> None:
    from gridmill.cli import build_parser

    known = {name.removeprefix("gridmill ") for name, _ in script("make_docs").walk(build_parser(), "gridmill")}
    for words in re.findall(r"^\s*(?:\$ )?gridmill ([a-z]+)", page.read_text(), flags=re.M):
        assert words in known, f"{page.name} shows `gridmill {words}`"


def test_every_message_of_the_link_is_in_the_protocol_page() -> None:
    from typing import get_args

    from gridmill.wire.messages import AnyMessage

    page = (ROOT / "docs" / "protocol.md").read_text()
    for kind in get_args(AnyMessage):
        assert f"`{kind.__struct_config__.tag}`" in page, f"docs/protocol.md does not mention {kind.__name__}"


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.M), f"README names `make {target}`"
