"""Pushes against a server that speaks the Hub's HTTP API: what is tried again, and what not.

Whatever happens the repository shows a whole commit or the one before. The client is the real one.
"""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from mm_moe.checkpoint import hub, hub_worker
from mm_moe.checkpoint.hub import Access, HubTarget
from mm_moe.errors import CheckpointError, ConfigError
from tests.hub_server import TOKEN

pytestmark = pytest.mark.faults
QUICK = (0.0, 0.0, 0.0)
TARGET = HubTarget("org/model", token=TOKEN, waits_s=QUICK, timeout_s=120)
CARD = "---\nlicense: other\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "final"
    place.mkdir()
    (place / "README.md").write_text(CARD)
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(bytes(range(256)) * 40)  # large enough for LFS
    return place


def shown(server, folder):
    """Whether the repository shows exactly the folder."""
    found = {k: v for k, v in server.files("org/model").items() if k != ".gitattributes"}
    return found == {name: file.read_bytes() for name, file in hub.folder_files(folder).items()}


def test_one_push_is_one_commit_and_the_same_again_is_none(server, folder):
    first = hub.push(folder, replace(TARGET, private=True), message="Hello")
    assert (first.state, first.tries, first.files) == ("pushed", 1, 3)
    assert first.url == f"{server.endpoint}/org/model"
    assert shown(server, folder)
    assert server.repos["org/model"].private
    assert server.repos["org/model"].messages == ["Hello"]
    assert first.commit == server.repos["org/model"].at("main")[0]
    assert hub.push(folder, TARGET).commit == first.commit
    assert server.num_commits("org/model") == 1


def test_weights_of_another_sharding_go_in_the_same_commit(server, folder):
    hub.push(folder, TARGET)
    (folder / "model.safetensors").unlink()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text(name)
    hub.push(folder, TARGET)
    assert shown(server, folder)
    assert server.num_commits("org/model") == 2


@pytest.mark.slow
def test_another_branch(server, folder):
    hub.push(folder, TARGET)
    (folder / "config.json").write_text("{ }")
    hub.push(folder, replace(TARGET, revision="trial"))
    assert server.files("org/model")["config.json"] == b"{}"
    assert server.files("org/model", "trial")["config.json"] == b"{ }"


def test_what_may_go_away_is_tried_again(server, folder):
    server.fault("POST /api/repos/create", status=503)
    server.fault("PUT /lfs/", cut=2000)
    commits = "POST .*/commit/"
    server.fault(commits, status=500)
    server.fault(commits, status=412, message="A commit has happened since.")
    server.fault(commits, status=409)
    server.fault(commits, status=429, headers={"Retry-After": "2"})
    server.fault(commits, cut=100)
    server.fault(commits, late=True)  # done, and only the answer is lost
    result = hub.push(folder, replace(TARGET, waits_s=(0.0,) * 8))
    assert (result.state, result.tries) == ("pushed", 8), result
    assert shown(server, folder)
    assert server.num_commits("org/model") == 1
    assert result.seconds >= 2  # as long as the limit asked
    assert sum("PUT" in request for request in server.requests) == 2


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_tried_again(server, folder, status):
    server.fault("POST /api/repos/create", status=status, times=9, message=f"no, {TOKEN}")
    result = hub.push(folder, TARGET)
    assert (result.state, result.tries) == ("refused", 1)
    assert f"answered {status}" in result.reason
    assert TOKEN not in str(result)


def answer(status, message="", **headers):
    request = SimpleNamespace(method="POST", url="https://hub.example/api")
    response = SimpleNamespace(status_code=status, headers=headers, request=request)
    return HfHubHTTPError("text", response=response, server_message=message)


@pytest.mark.parametrize(
    ("error", "said", "again", "wait_s"),
    [
        (answer(401), "HF_TOKEN", False, 0),
        (answer(403, "read only"), "403 (read only); take a token", False, 0),
        (answer(404), "user or organisation", False, 0),
        (answer(413), "answered 413", False, 0),
        (answer(409), "answered 409", True, 0),
        (answer(429, **{"Retry-After": "7"}), "answered 429", True, 7),
        (answer(503), "answered 503", True, 0),
        (ConnectionResetError("reset"), "no connection: ConnectionResetError", True, 0),
        (TimeoutError(), "no connection", True, 0),
        (RuntimeError("xet: stream closed"), "xet", True, 0),
        (FileNotFoundError("model.safetensors"), "FileNotFoundError", False, 0),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE", False, 0),
    ],
)
def test_what_is_said_of_a_failure(error, said, again, wait_s):
    reason, found_again, found_wait_s = hub_worker.explain(error)
    assert said in reason
    assert (found_again, found_wait_s) == (again, wait_s)


def test_a_refusal_behind_another_error_is_seen():
    error = RuntimeError("Error while uploading")
    error.__cause__ = answer(403)
    assert hub_worker.explain(error)[:2] == (hub_worker.explain(answer(403))[0], False)


def test_a_namespace_of_others(server, folder):
    result = hub.push(folder, replace(TARGET, repo_id="else/model"))
    assert (result.state, result.tries) == ("refused", 1)
    assert "no right to write to else" in result.reason
    assert server.repos == {}


def test_the_tries_end(server, folder):
    server.fault("POST .*/commit/", status=502, times=99)
    result = hub.push(folder, TARGET)
    assert (result.state, result.tries) == ("failed", 4)
    assert "502" in result.reason
    assert "4 times" in result.reason
    assert server.num_commits("org/model") == 0


def test_a_server_that_does_not_answer_ends_with_the_time(server, folder):
    server.fault("PUT /lfs/", hold=True, times=9)
    start = time.monotonic()
    result = hub.push(folder, replace(TARGET, timeout_s=3))
    assert result.state == "failed"
    assert "--hub_timeout_s 3" in result.reason
    assert 3 <= time.monotonic() - start < 100
    assert server.num_commits("org/model") == 0  # no half model


def test_no_server_and_no_such_name(server, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = hub.push(folder, replace(TARGET, waits_s=(0.0,)))
    assert (result.state, result.tries) == ("failed", 2)
    assert "no connection" in result.reason
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    access = hub.check_token(TARGET)
    assert access.state == "unreachable"
    assert access.reason


def test_a_push_that_is_ended_in_the_middle_leaves_the_commit_before(server, folder):
    hub.push(folder, TARGET)
    before = server.files("org/model")
    (folder / "model.safetensors").write_bytes(b"new" * 5000)
    server.fault("POST .*/commit/", hold=True)
    push = hub.Push(hub.folder_files(folder), TARGET, message="x", replaces=[""])
    results = []
    thread = threading.Thread(target=lambda: results.append(push.run()))
    thread.start()
    server.wait_for("/commit/", count=2)
    push.cancel()  # as a kill does
    thread.join(100)
    assert results[0].state == "failed"
    assert server.files("org/model") == before
    assert server.num_commits("org/model") == 1


def test_whose_token_it_is(server):
    assert hub.check_token(TARGET) == Access("known", "", ("org",))
    wrong = hub.check_token(replace(TARGET, token="hf_" + "Another" * 4))
    assert wrong.state == "refused"
    assert "401" in wrong.reason


@pytest.mark.slow
def test_a_hub_that_cannot_say_whose_token_it_is(server, folder, monkeypatch):
    server.fault("GET /api/whoami", status=500)
    assert hub.check_token(TARGET).state == "unreachable"
    server.fault("GET /api/whoami", hold=True)
    assert "no answer within 1 s" in hub.check_token(TARGET, limit_s=1).reason
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = hub.push(folder, TARGET)
    assert (result.state, result.tries) == ("refused", 1)
    assert "HF_HUB_OFFLINE" in result.reason


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x", "me/..", ""])
def test_names_that_no_repository_has(folder, name):
    with pytest.raises(ConfigError, match="ORG/NAME"):
        hub.push(folder, replace(TARGET, repo_id=name))


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="no file to push"):
        hub.push(tmp_path, TARGET)


def test_nothing_says_the_token():
    assert TOKEN not in repr(TARGET)
    assert hub.scrub(f"header {TOKEN} and hf_OtherTokenOfMine!", TOKEN) == "header *** and ***!"
    assert hub.scrub("no-prefix-secret", "no-prefix-secret") == "***"


def test_what_spoils_a_repository():
    remote = ["model.safetensors", "a/model.safetensors", "old.md", "last-checkpoint/random-3.pt"]
    stale = hub_worker.stale_files
    assert stale(remote, new=["config.json"], replaces=[""]) == ["model.safetensors"]
    assert stale(remote, new=["model.safetensors"], replaces=["", "last-checkpoint/"]) == [
        "last-checkpoint/random-3.pt"
    ]
