"""`make bench`: every published figure, with its reference from the same run; then docs/benchmarks.md.

Installs the peers (LiteLLM, Starlette) into an environment of their own, `.bench-venv`, the first time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = ROOT / ".bench-venv"
PEER_PACKAGES = ["litellm[proxy]==1.106.0"]  # brings Starlette, uvicorn and aiohttp for the plain proxy


def main() -> int:
    install_peers()
    if shutil.which("wrk") is None and shutil.which("apt-get") is not None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "wrk"], check=False)
    for name in ("gateway", "ledger", "engine", "sampler", "routing", "scheduler", "overload", "failover"):
        print(f"== bench/{name}.py", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    return subprocess.run([sys.executable, str(HERE / "report.py")], check=True).returncode


def install_peers() -> None:
    if (PEERS / "bin/litellm").exists():
        return
    print(f"== installing {', '.join(PEER_PACKAGES)} into {PEERS.name}", flush=True)
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "--quiet", str(PEERS)], check=True)
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", str(PEERS / "bin/python"), *PEER_PACKAGES], check=True
        )
        return
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    subprocess.run([str(PEERS / "bin/python"), "-m", "pip", "install", "--quiet", *PEER_PACKAGES], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
