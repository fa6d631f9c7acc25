"""Settings come in layers, and nothing misspelt passes in silence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from gridmill.settings_loader import SettingsError, field_names, load, parse_size, setting, toml_path_for


@dataclass(frozen=True)
class Mill:
    data: Path = Path("here")
    slots: int = setting(64, help="How many at once.")
    rate: float | None = None
    exact: bool | None = None
    engine: Literal["native", "echo"] = "native"
    memory_bytes: int = setting(0, parse=parse_size)
    names: tuple[str, ...] = ()
    config: Path | None = None

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError("--slots must be at least 1")


def read(tmp_path: Path, toml: str = "", flags: dict[str, object] | None = None, **environ: str) -> Mill:
    path = tmp_path / "gridmill.toml"
    path.write_text(toml)
    return load(
        Mill, flags=flags or {}, environ=environ, toml_path=path, table="node", known_elsewhere=("port", "node_key")
    )


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    toml = "[node]\nslots = 2\nrate = 1.5\nexact = true"
    assert read(tmp_path) == Mill()
    assert read(tmp_path, toml).slots == 2
    assert read(tmp_path, toml, GRIDMILL_SLOTS="3").slots == 3
    assert read(tmp_path, toml, GRIDMILL_SLOTS="3", GRIDMILL_NODE_SLOTS="4").slots == 4
    assert read(tmp_path, toml, {"slots": 5}, GRIDMILL_SLOTS="3").slots == 5
    assert read(tmp_path, toml, {"slots": None, "exact": False}).exact is False
    assert read(tmp_path, toml).rate == 1.5


def test_text_becomes_the_type_of_its_field(tmp_path: Path) -> None:
    mill = read(
        tmp_path,
        GRIDMILL_EXACT="off",
        GRIDMILL_RATE="20",
        GRIDMILL_ENGINE="echo",
        GRIDMILL_MEMORY_BYTES="2GiB",
        GRIDMILL_NAMES="a, b",
        GRIDMILL_DATA="~/mill",
    )
    assert mill == Mill(Path("~/mill").expanduser(), 64, 20.0, False, "echo", 2 << 30, ("a", "b"))


def test_paths_in_the_file_are_relative_to_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, '[node]\ndata = "d"').data == tmp_path / "d"


@pytest.mark.parametrize(
    ("toml", "flags", "environ", "sentence"),
    [
        ("[node]\nslotz = 1", {}, {}, "`slotz` under [node] in"),
        ("[node]\nslotz = 1", {}, {}, "did you mean slots?"),
        ("slots = 1", {}, {}, "put it under [node]"),
        ("[nodes]\nslots = 1", {}, {}, "did you mean [node]?"),
        ("node = 3", {}, {}, "must be a table"),
        ("[node", {}, {}, "cannot be read"),
        ("", {"slot": 1}, {}, "--slot is no setting of this program; did you mean --slots?"),
        ("", {}, {"GRIDMILL_SLOT": "1"}, "did you mean GRIDMILL_SLOTS?"),
        ("", {}, {"GRIDMILL_NODE_SLOT": "1"}, "GRIDMILL_NODE_SLOT"),
        ("", {}, {"GRIDMILL_SLOTS": "many"}, "GRIDMILL_SLOTS must be a whole number, not 'many'"),
        ("", {}, {"GRIDMILL_EXACT": "maybe"}, "GRIDMILL_EXACT must be true or false"),
        ("", {"engine": "vllm"}, {}, "--engine must be one of native, echo, not 'vllm'"),
        ("[node]\nrate = nan", {}, {}, "must be a finite number"),
        ("[node]\nslots = true", {}, {}, "must be a whole number"),
        ("", {"memory_bytes": "8 bananas"}, {}, "--memory-bytes: '8 bananas' is no size"),
        ("", {"slots": 0}, {}, "--slots must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, toml: str, flags: dict[str, object], environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, toml, flags, **environ)
    assert sentence in str(refused.value)


def test_settings_of_the_other_program_may_stand_in_the_same_environment_and_file(tmp_path: Path) -> None:
    assert read(tmp_path, "[network]\nport = 1", GRIDMILL_PORT="1", GRIDMILL_NODE_KEY="2", PATH="/bin") == Mill()
    assert read(tmp_path, GRIDMILL_NETWORK_ANYTHING="2") == Mill()


def test_a_required_setting_says_all_the_ways_to_give_it() -> None:
    @dataclass(frozen=True)
    class Needs:
        network: str

    with pytest.raises(
        SettingsError, match=r"--network is required \(or GRIDMILL_NETWORK, or `network` under \[node\]\)"
    ):
        load(Needs, flags={}, environ={}, toml_path=None, table="node")


def test_a_config_file_given_by_name_must_exist_and_the_one_in_the_data_folder_need_not(tmp_path: Path) -> None:
    assert toml_path_for({"config": "x.toml"}, {}, tmp_path) == (Path("x.toml"), True)
    assert toml_path_for({"data": str(tmp_path)}, {}, Path("d")) == (tmp_path / "gridmill.toml", False)
    assert toml_path_for({}, {"GRIDMILL_DATA": str(tmp_path)}, Path("d")) == (tmp_path / "gridmill.toml", False)
    assert load(Mill, flags={}, environ={}, toml_path=tmp_path / "no.toml", table="node") == Mill()
    with pytest.raises(SettingsError, match="does not exist"):
        load(Mill, flags={}, environ={}, toml_path=tmp_path / "no.toml", table="node", toml_required=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8G", 8 << 30), ("8gb", 8 * 10**9), ("1.5k", 1536), ("1000", 1000), ("12B", 12)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_field_names_are_what_another_program_may_meet_in_its_environment() -> None:
    assert {"data", "slots"} <= field_names(Mill)
