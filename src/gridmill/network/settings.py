"""The network's settings: one frozen object, built once. Every default is safe on a laptop's loopback."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gridmill.settings_loader import SettingsError, load, parse_size, setting, toml_path_for

DEFAULT_DATA = Path("~/.gridmill").expanduser()
DEFAULT_PORT = 8420


@dataclass(frozen=True)
class NetworkSettings:
    """What `gridmill network` can be told by flags, `GRIDMILL_…`, or `[network]` in DATA/gridmill.toml."""

    data: Path = setting(DEFAULT_DATA, help="folder for the database, keys and text files of this network")
    config: Path | None = setting(None, help="settings file (default: DATA/gridmill.toml, if it exists)")
    host: str = setting("127.0.0.1", help="address to listen on; anything but loopback turns on --join invite")
    port: int = setting(DEFAULT_PORT, help="port to listen on; 0 takes any free one")
    public_url: str | None = setting(None, help="the URL under which nodes and users reach this network from outside")
    join: Literal["open", "invite"] | None = setting(
        None, help="who may join as a node: open (default on loopback) or invite (default elsewhere)"
    )
    approve: Literal["open", "operator"] | None = setting(
        None, help="who decides what a model name means: open = any node (default on loopback), operator elsewhere"
    )
    database: str | None = setting(
        None,
        help="postgresql://USER@HOST/NAME for several gateways on one database (default: SQLite in the data folder)",
        secret=True,
    )
    fee_basis_points: int = setting(
        500, help="what the network adds to a node's price, in hundredths of a percent; a fee on nothing is nothing"
    )
    receipt_period_seconds: int = setting(
        86_400, help="receipts are totalled, and their Merkle root is published, for periods of this length"
    )
    lease_seconds: float = setting(
        20.0, help="how long a gateway that dies keeps the part of a balance that it holds; it renews while it lives"
    )
    tls_certificate: Path | None = setting(None, help="PEM file with the certificate chain, for https and wss")
    tls_key: Path | None = setting(None, help="PEM file with the certificate's private key")
    text_workers: int = setting(2, help="processes that run tokenizers and chat templates")
    body_bytes: int = setting(4 << 20, help="largest request body", parse=parse_size)
    queue_timeout_seconds: float = setting(30.0, help="how long a request may wait for a free place")
    queue_places_factor: float = setting(
        1.0, help="how many requests may wait for a model, as a multiple of the places that its nodes have"
    )
    queue_ttft_factor: float = setting(
        2.0,
        help="a request waits only while its first token still comes within this many times the usual time; 0: it "
        "waits --queue-timeout-seconds",
    )
    stall_gap_seconds: float = setting(
        1.0, help="a node that sends no token for this long loses the answer to another (see --stall-gap-factor)"
    )
    stall_gap_factor: float = setting(
        5.0, help="the same, as a multiple of the usual gap between its tokens; the longer of the two counts"
    )
    stall_first_token_seconds: float = setting(
        5.0, help="the same for the first token (see --stall-first-token-factor)"
    )
    stall_first_token_factor: float = setting(
        3.0, help="the same, as a multiple of the time predicted for the prompt; the longer of the two counts"
    )
    resume_timeout_seconds: float = setting(
        30.0, help="how long an answer whose node was lost may wait for a place on another"
    )
    client_stall_timeout_seconds: float = setting(60.0, help="a reader that takes nothing for this long is cut off")
    heartbeat_seconds: float = setting(5.0, help="how often nodes and network tell each other that they live")
    drain_timeout_seconds: float = setting(30.0, help="how long running answers may go on after Ctrl-C")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", help="how much goes to the log on stderr")
    json: bool = setting(False, help="print one line of JSON on stdout when ready, and log in JSON")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError("--port must be between 0 and 65535")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise SettingsError("--tls-certificate and --tls-key belong together: give both")
        if not 1 <= self.text_workers <= 64:
            raise SettingsError("--text-workers must be between 1 and 64")
        for name in (
            "queue_timeout_seconds",
            "queue_places_factor",
            "client_stall_timeout_seconds",
            "heartbeat_seconds",
            "stall_gap_seconds",
            "stall_gap_factor",
            "stall_first_token_seconds",
            "stall_first_token_factor",
            "resume_timeout_seconds",
        ):
            if getattr(self, name) <= 0:
                raise SettingsError(f"--{name.replace('_', '-')} must be above 0")
        if self.queue_ttft_factor != 0 and self.queue_ttft_factor < 1:
            raise SettingsError("--queue-ttft-factor must be at least 1, or 0 to let every request wait")
        if not 0 <= self.fee_basis_points <= 10_000:
            raise SettingsError(
                "--fee-basis-points must be between 0 and 10000, which is all of the node's price again"
            )
        if not 1 <= self.receipt_period_seconds <= 366 * 86_400:
            raise SettingsError("--receipt-period-seconds must be between 1 and a year")
        if not 1.0 <= self.lease_seconds <= 3600.0:
            raise SettingsError("--lease-seconds must be between 1 and 3600")
        if self.database is not None and not self.database.startswith(("postgresql://", "postgres://")):
            raise SettingsError("--database must be a postgresql:// address; without it SQLite is used")
        if self.body_bytes < 1024:
            raise SettingsError("--body-bytes must be at least 1 KiB")

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def invite_only(self) -> bool:
        return self.join == "invite" or (self.join is None and not self.on_loopback)

    @property
    def approve_mode(self) -> Literal["open", "operator"]:
        return self.approve or ("open" if self.on_loopback else "operator")


def load_network_settings(
    flags: Mapping[str, object], environ: Mapping[str, str], known_elsewhere: frozenset[str]
) -> NetworkSettings:
    """Raises SettingsError with one sentence that names the setting."""
    path, required = toml_path_for(flags, environ, DEFAULT_DATA)
    return load(
        NetworkSettings,
        flags=flags,
        environ=environ,
        toml_path=path,
        table="network",
        known_elsewhere=known_elsewhere,
        toml_required=required,
    )


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine only."""
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False
