"""`make demo`: a network and a node on this machine, one question through the public API, then everything stops.

It uses the same two commands that a person would type: `gridmill up` and `gridmill chat`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTION = "What is Gridmill?"
STOP_SECONDS = 60


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="gridmill-demo-") as data:
        gridmill = [sys.executable, "-m", "gridmill"]
        print("Starting a network and a node (gridmill up) …", flush=True)
        up = subprocess.Popen(
            [*gridmill, "up", "--json", "--port", "0", "--data", data], stdout=subprocess.PIPE, text=True
        )
        failed = 1
        try:
            failed = ask(gridmill, up, data)
        finally:
            if up.poll() is None:
                up.send_signal(signal.SIGINT)
            try:
                code = up.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                up.kill()
                raise
            print(f"Stopped cleanly (exit code {code})." if code == 0 else f"gridmill up ended with {code}.")
            failed = failed or code
    return failed


def ask(gridmill: list[str], up: subprocess.Popen[str], data: str) -> int:
    assert up.stdout is not None
    line = up.stdout.readline()
    if not line:
        print("The network did not start; its message is above.", file=sys.stderr)
        return up.wait()
    facts = json.loads(line)
    print(f"Ready at {facts['base_url']} with the model {facts['model']} on {facts['node_id']}.\n")
    print(f"> {QUESTION}", flush=True)
    environment = {**os.environ, "GRIDMILL_API_KEY": facts["api_key"], "GRIDMILL_BASE_URL": facts["base_url"]}
    chat = [*gridmill, "chat", "--data", data, "--temperature", "0", QUESTION]
    code = subprocess.run(chat, env=environment, cwd=Path.cwd(), check=False).returncode
    print(flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
