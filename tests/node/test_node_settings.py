"""What a node can be told, and what it refuses to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gridmill.node.settings import NodeSettings, load_node_settings
from gridmill.settings_loader import SettingsError
from gridmill.wire.messages import Price

URL = "http://127.0.0.1:8420"


def settings(tmp_path: Path, environ: dict[str, str] | None = None, **flags: Any) -> NodeSettings:
    return load_node_settings({"network": URL, "data": str(tmp_path), **flags}, environ or {}, ("port",))


def test_an_address_is_all_that_a_node_needs(tmp_path: Path) -> None:
    bare = settings(tmp_path)
    assert (bare.network, bare.model, bare.engine_kind, bare.slots) == (URL, "gridmill/demo", "native", 64)
    assert bare.exact is None and bare.pinned_network_key is None
    with pytest.raises(SettingsError, match="--network is required"):
        load_node_settings({}, {}, ())


def test_the_toml_file_in_the_data_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "gridmill.toml").write_text('[node]\nmodel = "x/y"\nkv-memory = "2GiB"\nowner = "me.key"')
    read = settings(tmp_path)
    assert (read.model, read.kv_memory, read.owner) == ("x/y", 2 << 30, tmp_path / "me.key")


def test_mock_is_another_name_for_echo(tmp_path: Path) -> None:
    assert settings(tmp_path, engine="mock").engine_kind == "echo"
    assert settings(tmp_path, {"GRIDMILL_ENGINE": "echo"}).engine_kind == "echo"


def test_settings_of_the_hubs_own_tools_are_honoured_where_ours_are_not_given(tmp_path: Path) -> None:
    theirs = {"HF_TOKEN": "hf_1", "HF_ENDPOINT": "https://mirror.example"}
    assert settings(tmp_path, theirs).hub_token == "hf_1"
    assert settings(tmp_path, theirs).hub_url == "https://mirror.example"
    assert settings(tmp_path, theirs | {"GRIDMILL_HUB_TOKEN": "hf_2"}).hub_token == "hf_2"
    assert settings(tmp_path, theirs, hub_url="https://own.example").hub_url == "https://own.example"


def test_secrets_are_not_printed_with_the_settings(tmp_path: Path) -> None:
    shown = repr(settings(tmp_path, join_token="gm-secret-1", hub_token="hf-secret-2"))
    assert "gm-secret" not in shown and "hf-secret" not in shown and "gridmill/demo" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"network": " "}, "--network is empty"),
        ({"model": ""}, "--model is empty"),
        ({"name": "x" * 201}, "1 to 200 printable characters"),
        ({"name": "a\nb"}, "1 to 200 printable characters"),
        ({"engine": "echo", "model": "x" * 201}, "1 to 200 printable characters"),
        ({"engine": "vllm"}, "--engine must be one of native, echo, mock"),
        ({"network_key": "abc"}, "64 hex digits"),
        ({"device": "tpu"}, "--device must be"),
        ({"exact": True, "dtype": "bfloat16"}, "--exact goes with --dtype float32 only"),
        ({"kv_memory": "8"}, "give a size with its unit"),
        ({"slots": 0}, "--slots must be between"),
        ({"context_tokens": 1}, "--context-tokens must be at least 2"),
        ({"threads": 0}, "--threads must be between"),
        ({"echo_tokens_per_second": 0.0}, "--echo-tokens-per-second must be above 0"),
        ({"echo_delay_seconds": -1.0}, "--echo-delay-seconds must be between"),
        ({"echo_ids_per_step": 0}, "--echo-ids-per-step must be between"),
        ({"drain_timeout_seconds": -1.0}, "--drain-timeout-seconds must be between"),
        ({"modle": "x"}, "did you mean --model?"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(tmp_path, **flags)
    assert sentence in str(refused.value)


def test_a_misspelt_variable_is_refused_and_another_programs_is_not(tmp_path: Path) -> None:
    assert settings(tmp_path, {"GRIDMILL_PORT": "1", "GRIDMILL_NETWORK_HOST": "::1"}).slots == 64
    with pytest.raises(SettingsError, match=r"GRIDMILL_SLOT is no setting; did you mean GRIDMILL_SLOTS\?"):
        settings(tmp_path, {"GRIDMILL_SLOT": "1"})


PRICES = {
    "50/400": Price(50, 50, 400),
    "50/10/400": Price(50, 10, 400),
    "0/0": Price(),
    "1000000000/1/0": Price(10**9, 1, 0),
}
NO_PRICES = ("", "50", "a/b", "-1/2", "1/2/3/4", "10/50/400", "1.5/2", "1000000001/1", "٣/٤", "1/2 ")


@pytest.mark.parametrize("text", PRICES)
def test_a_price_is_read_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert settings(tmp_path, price=text).asked_price == PRICES[text]


def test_a_node_without_a_price_asks_nothing(tmp_path: Path) -> None:
    assert settings(tmp_path).asked_price == Price()


@pytest.mark.parametrize("text", NO_PRICES)
def test_a_price_that_is_none_is_one_sentence_that_names_the_flag(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--price must be INPUT/OUTPUT"):
        settings(tmp_path, price=text)
