"""The node's settings: one frozen object, built once from flags, `GRIDMILL_…`, TOML and defaults.

This is the only file of the node that sees the environment, and it gets it as an argument. Every command line imports
it to print its help, so it imports next to nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gridmill.demo import DEMO_MODEL_NAME
from gridmill.settings_loader import SettingsError, load, parse_size, setting, toml_path_for

if TYPE_CHECKING:
    from gridmill.wire.messages import Price

DEFAULT_DATA = Path("~/.gridmill").expanduser()
HUB_URL = "https://huggingface.co"
DTypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
KV_BYTES_MIN = 1 << 20  # less holds not one page of a real model; a number without its unit is caught here


@dataclass(frozen=True)
class NodeSettings:
    """What `gridmill node` can be told by flags, `GRIDMILL_…`, or `[node]` in DATA/gridmill.toml."""

    network: str = setting(help="address of the network to join, with or without /v1")
    model: str = setting(
        DEMO_MODEL_NAME, help="folder, OWNER/NAME on the Hugging Face hub, or gridmill/demo, a toy that ships"
    )
    name: str | None = setting(None, help="name to offer the model under (default: its folder's or repo's name)")
    revision: str | None = setting(None, help="branch, tag or commit on the hub (default: main, pinned at first use)")
    engine: Literal["native", "echo", "mock"] = setting(
        "native", help="what computes: native needs gridmill[node]; echo, also named mock, makes ids up at any speed"
    )
    data: Path = setting(DEFAULT_DATA, help="folder for this node's key, models and what it has measured")
    config: Path | None = setting(None, help="settings file (default: DATA/gridmill.toml, if it exists)")
    owner: Path | None = setting(None, help="key file of the node's owner (default: the node is its own owner)")
    join_token: str | None = setting(None, help="token from `gridmill keys create NAME --scope node`", secret=True)
    network_key: str | None = setting(
        None, help="the network's public key, 64 hex digits as `gridmill status` shows (default: pinned at first join)"
    )
    ca_file: Path | None = setting(None, help="PEM file with the authority that signed the network's certificate")
    insecure: bool = setting(False, help="allow a link without TLS to another machine")
    price: str | None = setting(
        None,
        help="what you ask, INPUT/OUTPUT or INPUT/CACHED/OUTPUT in nanocredits per token, such as 50/400: "
        "1 nanocredit per token is 0.001 credit per million tokens (default: nothing)",
    )
    region: str | None = setting(
        None, help="where the node stands, one word such as eu-west, for callers who ask for a region (default: unsaid)"
    )
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, mps: where the model computes")
    dtype: DTypeChoice = setting(
        "auto", help="number format; auto is float32 on a CPU, else what the model was saved in"
    )
    exact: bool | None = setting(None, help="ids that depend on the request alone, in float32 (default: for the demo)")
    kv_memory: int | None = setting(None, help="memory for running conversations, such as 8GiB", parse=parse_size)
    slots: int = setting(64, help="how many works run at once")
    context_tokens: int | None = setting(None, help="cap on prompt plus answer (default: what the model was made for)")
    threads: int | None = setting(
        None, help="CPU threads of the native engine (default: one less than there are cores)"
    )
    trust_remote_code: bool = setting(
        False, help="run Python code that comes with the model; it can do anything you can"
    )
    echo_tokens_per_second: float | None = setting(None, help="speed of each echo stream (default: as fast as it goes)")
    echo_delay_seconds: float = setting(0.0, help="how long echo waits before its first token")
    echo_ids_per_step: int = setting(1, help="ids of a stream that echo makes in one step")
    drain_timeout_seconds: float = setting(30.0, help="how long running works may go on after Ctrl-C")
    hub_url: str = setting(HUB_URL, help="where models are downloaded from")
    hub_token: str | None = setting(None, help="access token for the hub, for models that need one", secret=True)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", help="how much goes to the log on stderr")
    json: bool = setting(False, help="print one line of JSON on stdout when ready, and log in JSON")
    exit_with_parent: bool = setting(False, help="(internal) end when standard input does, as `gridmill up` wants it")
    log_json: bool | None = setting(None, help="(internal) log in JSON whatever --json says")

    def __post_init__(self) -> None:
        # Late, because the codec brings the library of signatures with it, which a --help does not need.
        from gridmill.wire.codec import DRAIN_SECONDS_MAX, NAME_CHARS_MAX, REGION_CHARS_MAX, SLOTS_MAX

        _require(bool(self.network.strip()), "--network is empty: give the address of the network to join")
        _require(bool(self.model.strip()), "--model is empty: give a folder, OWNER/NAME or gridmill/demo")
        for name in (self.name, self.model if self.engine_kind == "echo" else None):
            fine = name is None or (0 < len(name) <= NAME_CHARS_MAX and name.isprintable())
            _require(fine, f"a model's name must be 1 to {NAME_CHARS_MAX} printable characters")
        plain = self.name is None or not any(c in " @" for c in self.name)
        _require(plain, f"a model's name holds no spaces and no '@': give another --name than {self.name!r}")
        _require(
            self.price is None or parse_price(self.price) is not None,
            f"--price must be INPUT/OUTPUT or INPUT/CACHED/OUTPUT in whole nanocredits per token, such as 50/400 or "
            f"50/10/400, cached input not above other input, and none above 10^9; not {self.price!r}",
        )
        region = self.region or ""
        _require(
            region.isascii() and region.isprintable() and " " not in region and len(region) <= REGION_CHARS_MAX,
            f"--region must be one word of at most {REGION_CHARS_MAX} ASCII characters, such as eu-west",
        )
        _require(
            self.network_key is None or re.fullmatch(r"[0-9a-fA-F]{64}", self.network_key) is not None,
            "--network-key must be 64 hex digits; the network prints it, and DATA/networks.json keeps it",
        )
        _require(
            re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device) is not None,
            f"--device must be auto, cpu, mps, cuda or cuda:N, not {self.device!r}",
        )
        _require(not (self.exact and self.dtype not in ("auto", "float32")), "--exact goes with --dtype float32 only")
        _require(
            self.kv_memory is None or self.kv_memory >= KV_BYTES_MIN,
            f"--kv-memory {self.kv_memory} is too little; give a size with its unit, such as 8GiB",
        )
        _require(1 <= self.slots < SLOTS_MAX, f"--slots must be between 1 and {SLOTS_MAX - 1}")
        _require(self.context_tokens is None or self.context_tokens >= 2, "--context-tokens must be at least 2")
        _require(self.threads is None or 1 <= self.threads <= 1024, "--threads must be between 1 and 1024")
        rate = self.echo_tokens_per_second
        _require(rate is None or rate > 0, "--echo-tokens-per-second must be above 0")
        _require(0 <= self.echo_delay_seconds <= 3600, "--echo-delay-seconds must be between 0 and 3600")
        _require(1 <= self.echo_ids_per_step <= 1024, "--echo-ids-per-step must be between 1 and 1024")
        _require(
            0 <= self.drain_timeout_seconds <= DRAIN_SECONDS_MAX,
            f"--drain-timeout-seconds must be between 0 and {DRAIN_SECONDS_MAX:.0f}",
        )

    @property
    def engine_kind(self) -> Literal["native", "echo"]:
        return "native" if self.engine == "native" else "echo"

    @property
    def asked_price(self) -> Price:
        from gridmill.wire.messages import Price

        return (parse_price(self.price) if self.price is not None else None) or Price()

    @property
    def pinned_network_key(self) -> bytes | None:
        return bytes.fromhex(self.network_key) if self.network_key is not None else None


def parse_price(text: str) -> Price | None:
    """A price as people write it, in nanocredits per token; None when it is none. Cached input costs as other input
    where nothing else is said."""
    from gridmill.wire.codec import PRICE_NANOCREDITS_MAX
    from gridmill.wire.messages import Price

    if re.fullmatch(r"\d{1,10}(/\d{1,10}){1,2}", text, flags=re.ASCII) is None:
        return None
    parts = [int(part) for part in text.split("/")]
    price = Price(parts[0], parts[-2], parts[-1])
    fine = max(parts) <= PRICE_NANOCREDITS_MAX and price.cached_input_nanocredits <= price.input_nanocredits
    return price if fine else None


def load_node_settings(
    flags: Mapping[str, object], environ: Mapping[str, str], known_elsewhere: Collection[str] = ()
) -> NodeSettings:
    """Raises SettingsError with one sentence that names the setting.

    HF_TOKEN and HF_ENDPOINT, which people who use the hub have set already, stand in where ours are not given.
    """
    path, required = toml_path_for(flags, environ, DEFAULT_DATA)
    settings = load(
        NodeSettings,
        flags=flags,
        environ=environ,
        toml_path=path,
        table="node",
        known_elsewhere=known_elsewhere,
        toml_required=required,
    )
    if settings.hub_token is None and environ.get("HF_TOKEN"):
        settings = dataclasses.replace(settings, hub_token=environ["HF_TOKEN"])
    if settings.hub_url == HUB_URL and environ.get("HF_ENDPOINT"):
        settings = dataclasses.replace(settings, hub_url=environ["HF_ENDPOINT"])
    return settings


def _require(fine: bool, sentence: str) -> None:
    if not fine:
        raise SettingsError(sentence)
