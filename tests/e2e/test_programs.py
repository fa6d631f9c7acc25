"""The programs as people run them: started, killed, restarted, asked, and left, over real sockets."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from programs import Place, Stream, gridmill, place, run, until

DEMO = "gridmill/demo"
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as made:
        yield made


def available(here: Place) -> bool:
    return any(model["nodes"] for model in here.status()["models"])


# ---------------------------------------------------------------- starting and stopping


def test_up_says_where_it_is_answers_and_leaves_nothing_behind(here: Place) -> None:
    data = here.folder / "up"
    up = here.start("up", "--port", "0", "--data", data, "--engine", "echo").ready()
    assert set(up.facts) == {"base_url", "api_key", "model", "node_id"}
    assert up.facts["base_url"].endswith("/v1") and up.facts["model"] == DEMO
    family = up.family()
    assert len(family) >= 2
    stream = Stream(up.facts["base_url"], up.facts["api_key"], model=DEMO, messages=HELLO, max_tokens=5)
    assert stream.response.headers["x-gridmill-node"] == up.facts["node_id"]
    assert stream.response.headers["x-gridmill-request-id"]
    last = stream.events()[-1]
    assert last["gridmill"]["nodes"] == [up.facts["node_id"]]
    assert last["gridmill"]["request_id"] == stream.response.headers["x-gridmill-request-id"]
    assert up.interrupt() == 0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not (data / "control.sock").exists()


def test_a_second_run_on_the_same_folder_keeps_its_key_and_its_node(here: Place) -> None:
    facts = []
    for _ in range(2):
        up = here.start("up", "--port", "0", "--data", here.folder / "up", "--engine", "echo").ready()
        facts.append(up.facts)
        assert up.interrupt() == 0
    assert facts[0]["api_key"] == facts[1]["api_key"] and facts[0]["node_id"] == facts[1]["node_id"]


def test_two_programs_on_one_folder_are_refused_with_a_sentence(here: Place) -> None:
    here.network()
    second = run("network", "--port", "0", "--data", here.folder / "network")
    assert second.returncode == 1 and "in use by another gridmill network" in second.stderr


def test_killing_up_takes_its_node_along(here: Place) -> None:
    up = here.start("up", "--port", "0", "--data", here.folder / "up", "--engine", "echo").ready()
    family = up.family()
    up.kill()
    until(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


def test_a_killed_node_under_up_is_started_again(here: Place) -> None:
    up = here.start("up", "--port", "0", "--data", here.folder / "up", "--engine", "echo").ready()
    node = next(child for child in up.family()[1:] if "node" in child.cmdline())
    node.kill()
    data = here.folder / "up"
    until(lambda: not any(model["nodes"] for model in here.status(data)["models"]))
    until(lambda: any(model["nodes"] for model in here.status(data)["models"]))
    stream = Stream(up.facts["base_url"], up.facts["api_key"], model=DEMO, messages=HELLO, max_tokens=3)
    assert stream.text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["network", "--port", "99999"], 2, "--port must be"),
        (["network", "--host", "203.0.113.7", "--port", "0"], 1, "cannot listen on"),
        (["node", "--network", "http://127.0.0.1:1", "--dtype", "float7"], 2, "--dtype"),
        (["node", "--network", "http://203.0.113.7:1", "--engine", "echo"], 2, "--insecure"),
        (["node", "--network", "http://127.0.0.1:1", "--model", "./nowhere-at-all"], 4, "nowhere-at-all"),
        (["keys", "list"], 2, "does not exist"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence_and_its_exit_code(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    done = run(*arguments, "--data", tmp_path / "data")
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_misspelt_setting_is_refused_by_name_wherever_it_stands(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    done = run("network", "--data", data, GRIDMILL_QUEUE_TIMEOUT_SECOND="3")
    assert done.returncode == 2 and "GRIDMILL_QUEUE_TIMEOUT_SECONDS" in done.stderr
    (data / "gridmill.toml").write_text("[network]\nprot = 8000\n")
    done = run("network", "--data", data)
    assert done.returncode == 2 and "did you mean port" in done.stderr


# ---------------------------------------------------------------- keys


def test_keys_of_a_running_network_act_at_once(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo")
    key = here.key("alice")
    assert Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=2).text()
    gridmill("keys", "revoke", "alice", "--data", here.folder / "network")
    refused = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=2)
    assert refused.response.status == 401
    rows = json.loads(gridmill("keys", "list", "--json", "--data", here.folder / "network"))
    assert rows[0]["name"] == "alice" and rows[0]["revoked_seconds"]
    assert key not in gridmill("keys", "list", "--data", here.folder / "network")


def test_a_node_key_buys_no_inference_and_an_inference_key_lets_no_node_in(here: Place) -> None:
    network = here.network("--join", "invite")
    for token in ("", here.key("user")):
        refused = run(
            "node",
            "--network",
            network.facts["base_url"],
            "--engine",
            "echo",
            "--data",
            here.folder / "stranger",
            "--join-token",
            token,
        )
        assert refused.returncode == 3 and "keys create" in refused.stderr
    invitation = here.key("friend", "node")
    here.node(network, "--engine", "echo", "--join-token", invitation)
    assert Stream(network.facts["base_url"], invitation, model=DEMO, messages=HELLO).response.status == 403


# ---------------------------------------------------------------- dying and coming back


def test_killing_the_node_ends_its_stream_with_an_error_event_and_its_return_makes_the_model_available(
    here: Place,
) -> None:
    network = here.network()
    node = here.node(network, "--engine", "echo", "--echo-tokens-per-second", "50")
    key = here.key()
    stream = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=900)
    for _ in range(10):
        assert stream.event()
    node.kill()
    events = stream.events()
    assert events[-1]["error"]["code"] and "node" in events[-1]["error"]["message"]
    until(lambda: not available(here))
    refused = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO)
    assert refused.response.status == 503 and int(refused.response.headers["retry-after"]) > 0
    here.node(network, "--engine", "echo")
    until(lambda: available(here))
    assert Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=3).text()


def test_killing_the_network_lets_the_node_come_back_by_itself(here: Place) -> None:
    network = here.network()
    node = here.node(network, "--engine", "echo")
    key = here.key()
    port = int(network.facts["base_url"].rsplit(":", 1)[1].split("/")[0])
    network.kill()
    again = here.network(port=port)
    until(lambda: available(here), seconds=60)
    assert node.process.poll() is None
    assert Stream(again.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=3).text()


def test_interrupting_the_network_lets_a_running_answer_finish_and_admits_no_other(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo", "--echo-tokens-per-second", "100")
    key = here.key()
    stream = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=150)
    assert stream.event()
    network.process.send_signal(signal.SIGINT)
    assert stream.events()[-1]["choices"][0]["finish_reason"] == "length"
    assert network.process.wait(30) == 0


def test_interrupting_a_node_lets_its_answers_finish(here: Place) -> None:
    network = here.network()
    node = here.node(network, "--engine", "echo", "--echo-tokens-per-second", "100")
    key = here.key()
    stream = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=150)
    assert stream.event()
    node.process.send_signal(signal.SIGTERM)
    assert stream.events()[-1]["choices"][0]["finish_reason"] == "length"
    assert node.process.wait(30) == 0


# ---------------------------------------------------------------- readers


def test_a_client_that_leaves_cancels_its_work_on_the_node(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo", "--echo-tokens-per-second", "20")
    key = here.key()
    stream = Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=900)
    assert stream.event() and here.status()["works_running"] == 1
    stream.close()
    until(lambda: here.status()["works_running"] == 0, seconds=5)


def test_a_slow_reader_slows_its_own_stream_only_and_loses_nothing(here: Place) -> None:
    network = here.network()
    here.node(network, "--engine", "echo")
    key = here.key()
    asked = {"model": DEMO, "messages": HELLO, "max_tokens": 900, "seed": 7}
    slow = Stream(network.facts["base_url"], key, **{**asked, "n": 8})  # more than fits into socket buffers
    assert slow.event()
    memory = psutil.Process(network.process.pid).memory_info().rss
    whole = [Stream(network.facts["base_url"], key, **asked).text() for _ in range(5)]
    assert len(set(whole)) == 1
    assert psutil.Process(network.process.pid).memory_info().rss < memory + (64 << 20)
    choices: dict[int, str] = {}
    for event in slow.events():
        for choice in event["choices"]:
            choices[choice["index"]] = choices.get(choice["index"], "") + (choice["delta"].get("content") or "")
    assert choices[0] == whole[0] and len(set(choices.values())) == 8


# ---------------------------------------------------------------- the commands people type


def test_chat_models_and_status_show_a_person_what_they_need(here: Place) -> None:
    data = here.folder / "up"
    up = here.start("up", "--port", "0", "--data", data, "--engine", "echo").ready()
    said = run("chat", "hello", "--data", data, "--max-tokens", "20", "--seed", "1")
    assert said.returncode == 0 and said.stdout.strip() and "tokens/s" in said.stderr
    answer = json.loads(gridmill("chat", "hello", "--data", data, "--max-tokens", "5", "--seed", "1", "--json"))
    assert answer["completion_tokens"] == 5 and answer["nodes"] == [up.facts["node_id"]]
    assert DEMO in gridmill("models", "--data", data) and "toy" in gridmill("models", "--data", data)
    assert json.loads(gridmill("models", "--json", "--data", data))[0]["id"] == DEMO
    shown = gridmill("status", "--data", data)
    assert up.facts["node_id"] in shown and DEMO in shown
    wrong = run("chat", "hello", "--data", data, "--model", "gridmil/demo")
    assert wrong.returncode == 1 and "gridmill/demo" in wrong.stderr
    up.close()
    gone = run("chat", "hello", "--data", data)
    assert gone.returncode == 3 and "cannot be reached" in gone.stderr


def test_an_operators_approval_decides_what_a_name_means(here: Place) -> None:
    network = here.network("--approve", "operator")
    here.node(network, "--engine", "echo", "--model", "acme/one")
    key = here.key()
    data = here.folder / "network"
    waiting = until(lambda: json.loads(gridmill("classes", "list", "--json", "--data", data)))
    assert waiting[0]["name"] == "acme/one" and not waiting[0]["approved"]
    refused = Stream(network.facts["base_url"], key, model="acme/one", messages=HELLO)
    assert refused.response.status == 404 and b"classes approve" in refused.response.read()
    gridmill("classes", "approve", "house-model", waiting[0]["class_id"][:8], "--data", data)
    gridmill("classes", "approve", "acme/one", waiting[0]["class_id"][:8], "--data", data)
    until(lambda: available(here))
    for name in ("acme/one", "house-model"):
        assert Stream(network.facts["base_url"], key, model=name, messages=HELLO, max_tokens=3).text()
    gridmill("classes", "withdraw", "house-model", waiting[0]["class_id"][:8], "--data", data)
    assert Stream(network.facts["base_url"], key, model="house-model", messages=HELLO).response.status == 404


def test_no_log_line_holds_a_prompt_or_a_key(here: Place) -> None:
    network = here.network("--log-level", "debug")
    here.node(network, "--engine", "echo", "--log-level", "debug")
    key = here.key()
    secret = "the password is swordfish"
    Stream(
        network.facts["base_url"], key, model=DEMO, messages=[{"role": "user", "content": secret}], max_tokens=3
    ).text()
    Stream(network.facts["base_url"], key, model=DEMO, messages=[{"role": "user", "content": secret}], nonsense=secret)
    logs = "".join(path.read_text() for path in here.folder.glob("*.log"))
    assert "request" in logs and "swordfish" not in logs and key not in logs


def test_metrics_count_what_happened(here: Place) -> None:
    import urllib.request

    network = here.network()
    here.node(network, "--engine", "echo")
    key = here.key()
    Stream(network.facts["base_url"], key, model=DEMO, messages=HELLO, max_tokens=37).text()
    root = network.facts["base_url"].removesuffix("/v1")
    shown = urllib.request.urlopen(f"{root}/metrics").read().decode()
    assert "gridmill_tokens_delivered_total 37.0" in shown and "gridmill_links 1.0" in shown
    assert 'endpoint="' in shown and "gridmill_ttft_seconds_count 1.0" in shown
    health = urllib.request.urlopen(f"{root}/healthz")
    assert health.status == 200 and health.headers["x-gridmill-request-id"]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("network.key", b"short", 1),
        ("gateway.secret", b"", 1),
        ("network.sqlite", b"not a database " * 400, 1),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, name: str, content: bytes, code: int) -> None:
    (tmp_path / name).write_bytes(content)
    done = run("network", "--port", "0", "--data", tmp_path)
    assert done.returncode == code and name in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_one_accounts_cached_prompt_says_nothing_to_another(here: Place) -> None:
    network = here.network()
    here.node(network, "--kv-memory", "64MiB")
    asked = {
        "model": DEMO,
        "prompt": list(range(10, 210)),
        "max_tokens": 2,
        "stream_options": {"include_usage": True},
    }

    def cached(key: str, **more: str) -> int:
        events = Stream(network.facts["base_url"], key, **asked, **more).events()
        return int(events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])

    alice, bob = here.key("alice"), here.key("bob")
    assert cached(alice) == 0 and cached(alice) > 100
    assert cached(bob) == 0 and cached(bob) > 100
    assert cached(alice, cache_salt="s") == 0 and cached(bob, cache_salt="s") == 0 and cached(alice, cache_salt="s") > 0


def test_ctrl_c_stops_a_program_whose_log_nobody_reads_any_more(here: Place) -> None:
    import os
    import subprocess
    import sys

    from programs import clean_environment

    reader, writer = os.pipe()
    network = subprocess.Popen(
        [sys.executable, "-m", "gridmill", "network", "--port", "0", "--json", "--data", here.folder / "network"],
        stdout=subprocess.PIPE,
        stderr=writer,
        env=clean_environment(),
        start_new_session=True,
    )
    os.close(writer)
    assert network.stdout is not None and network.stdout.readline()
    os.close(reader)  # as `… 2>&1 | tee` when tee is gone
    network.send_signal(signal.SIGINT)
    assert network.wait(20) == 0
    network.stdout.close()


def test_a_revoked_invitation_sends_its_node_away(here: Place) -> None:
    network = here.network("--join", "invite")
    node = here.node(network, "--engine", "echo", "--join-token", here.key("friend", "node"))
    assert available(here)
    gridmill("keys", "revoke", "friend", "--data", here.folder / "network")
    assert node.process.wait(30) == 3
    until(lambda: not available(here))


def test_a_model_folder_with_a_space_in_its_name_is_offered_under_a_name_without(here: Place) -> None:
    from gridmill.demo import demo_model_folder

    folder = here.folder / "my model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((demo_model_folder() / name).read_bytes())
    network = here.network()
    node = here.node(network, "--engine", "echo", "--model", str(folder))
    assert node.facts["model"] == "my-model"
    assert Stream(network.facts["base_url"], here.key(), model="my-model", messages=HELLO, max_tokens=3).text()


def test_an_empty_question_and_a_key_with_more_than_a_key_in_it_are_sentences(here: Place) -> None:
    data = here.folder / "up"
    here.start("up", "--port", "0", "--data", data, "--engine", "echo").ready()
    empty = run("chat", " ", "--data", data)
    assert empty.returncode == 1 and "empty" in empty.stderr
    pasted = run("models", "--data", data, GRIDMILL_API_KEY="gm-key\nThis is the only time")
    assert pasted.returncode == 2 and "API key" in pasted.stderr


# ---------------------------------------------------------------- TLS


def test_a_certificate_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = run("network", "--port", "0", "--data", tmp_path, "--tls-certificate", "/nope", "--tls-key", "/nope")
    assert done.returncode == 1 and "cannot be used" in done.stderr and "Traceback" not in done.stderr


def test_with_a_certificate_of_its_own_authority_node_and_user_speak_tls(here: Place) -> None:
    authority, certificate, key = (here.folder / name for name in ("ca.pem", "server.pem", "server.key"))
    make_certificates(here.folder)
    network = here.network("--tls-certificate", str(certificate), "--tls-key", str(key))
    base_url = network.facts["base_url"]
    assert base_url.startswith("https://")
    refused = run("node", "--network", base_url, "--engine", "echo", "--data", here.folder / "stranger")
    assert refused.returncode == 3 and "--ca-file" in refused.stderr
    here.node(network, "--engine", "echo", "--ca-file", str(authority))
    api_key = here.key()
    asked = ("chat", "hello", "--base-url", base_url, "--max-tokens", "3", "--json", "--data", here.folder)
    answer = json.loads(gridmill(*asked, "--ca-file", authority, GRIDMILL_API_KEY=api_key))
    assert answer["completion_tokens"] == 3
    untrusting = run(*asked, GRIDMILL_API_KEY=api_key)
    assert untrusting.returncode == 3 and "certificate" in untrusting.stderr


def make_certificates(folder: Path) -> None:
    """An authority and a server certificate for 127.0.0.1, by the openssl that every system has."""
    import subprocess

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    subject = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2")
    (folder / "names.cnf").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl("req", "-x509", *subject, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority")
    openssl("req", *subject[:-2], "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names.cnf", "-days", "2")
    openssl("x509", "-req", "-in", "server.csr", *signing, "-out", "server.pem")
