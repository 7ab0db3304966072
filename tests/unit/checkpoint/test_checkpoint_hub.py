"""The model card of a run, and the push: what is tried again, what not; no token is ever said."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from mm_moe.checkpoint import hub
from mm_moe.errors import CheckpointError, ConfigError

TOKEN = "hf_" + "Secret" * 5
RECORD = {
    "command": ["launch/train.py", "--config", "emoji_replay"],
    "arguments": {
        "backbone": "small_clip",
        "num_experts": 4,
        "top_k_experts": 1,
        "prompt": "replay",
    },
    "data": {"name": "emoji", "license": "OpenMoji CC BY-SA 4.0", "sha256": "ab12" * 16},
    "missing": {"words": "50% of samples lack something: 25% no text, 25% no image"},
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.15.0", "deepspeed": "0.19.8"},
}
SCORES = {
    "metrics": ["accuracy", "macro_f1"],
    "models": {
        "replay": {"complete": {"accuracy": 0.9125}, "mixed": {"accuracy": 0.75}},
        "no prompts": {"complete": {"accuracy": 0.9}, "mixed": {"accuracy": 0.5}},
    },
    "conditions": ["complete", "mixed"],
    "chance": {
        "complete": {"majority": {"accuracy": 0.25}, "uniform": {"accuracy": 0.125}},
        "mixed": {"majority": {"accuracy": 0.25}, "prior": {"macro_f1": 0.9}},
    },
    "num_rows": {"complete": 200, "mixed": 199},
}


def test_the_table_in_full():
    assert hub.score_table(SCORES).splitlines() == [
        "Test accuracy by what the inputs lack:",
        "",
        "| inputs | rows | replay | no prompts | chance |",
        "|---|---|---|---|---|",
        "| complete | 200 | 0.912 | 0.900 | 0.250 |",
        "| mixed | 199 | 0.750 | 0.500 | 0.250 |",
    ]


def test_the_card_says_what_was_trained_on_what(tmp_path):
    hub.write_card(tmp_path, RECORD, SCORES)
    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "mm-moe" in yaml.safe_load(front)["tags"]
    for words in (
        "# A sparse multimodal model trained on emoji",
        "`small_clip`, 4 experts per sparse layer (top 1), prompts `replay`",
        RECORD["missing"]["words"],
        "| mixed | 199 | 0.750 | 0.500 | 0.250 |",
        "OpenMoji CC BY-SA 4.0",
        "`ab12ab12ab12ab12`",
        "launch/train.py --config emoji_replay",
        "`0123456789ab`, torch 2.15.0, DeepSpeed 0.19.8",
    ):
        assert words in body


def test_a_run_without_scores_says_so(tmp_path):
    assert "Not evaluated." in hub.model_card(RECORD, None)


class FakeApi:
    """A Hub that answers each upload with the next of a list."""

    endpoint = "https://hub.example"
    answers: ClassVar[list] = []
    calls: ClassVar[list] = []

    def __init__(self, token=None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options) -> None:
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, **options) -> None:
        self.calls.append(("upload", options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer


def http_error(status: int) -> HfHubHTTPError:
    request = SimpleNamespace(method="POST", url="https://hub.example")
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    return HfHubHTTPError(f"{status} for token {TOKEN}", response=response)


@pytest.fixture
def answers(monkeypatch):
    """What the Hub answers; also the waits that were slept."""
    waits: list[float] = []
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(FakeApi, "calls", [])

    def answer(*with_what):
        monkeypatch.setattr(FakeApi, "answers", list(with_what))
        return waits

    return answer


def test_a_push_that_works(answers, tmp_path):
    waits = answers(None)
    assert hub.push(tmp_path, "me/model", private=True) == "https://hub.example/me/model"
    assert FakeApi.calls == [
        ("token", TOKEN),
        ("create", "me/model", {"private": True, "exist_ok": True}),
        ("upload", {"folder_path": tmp_path, "repo_id": "me/model"}),
    ]
    assert waits == []


def test_a_token_given_by_hand_beats_the_environment(answers, tmp_path):
    answers(None)
    hub.push(tmp_path, "me/model", token="another")
    assert FakeApi.calls[0] == ("token", "another")


def test_server_errors_and_cut_connections_are_tried_again(answers, tmp_path):
    waits = answers(http_error(503), ConnectionResetError(TOKEN), None)
    assert hub.push(tmp_path, "me/model").endswith("me/model")
    assert waits == [1.0, 4.0]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again_and_names_the_variable(answers, tmp_path, status):
    waits = answers(http_error(status))
    with pytest.raises(CheckpointError) as caught:
        hub.push(tmp_path / "final", "me/model")
    said = str(caught.value)
    assert f"answered {status}" in said
    assert "HF_TOKEN" in said
    assert f"python launch/export.py {tmp_path} --push_to_hub me/model" in said
    assert TOKEN not in said
    assert waits == []


@pytest.mark.parametrize("error", [http_error(500), OSError(f"no route, token {TOKEN}")])
def test_after_the_last_wait_it_is_given_up(answers, tmp_path, error, caplog, capfd):
    waits = answers(*[error] * 4)
    with pytest.raises(CheckpointError) as caught:
        hub.push(tmp_path / "final", "me/model")
    assert waits == [1.0, 4.0, 16.0]
    said = str(caught.value) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in said
    assert "500" in said or "OSError" in said


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x", "me/..", ""])
def test_names_that_no_repository_has(answers, tmp_path, name):
    answers(None)
    with pytest.raises(ConfigError, match="ORG/NAME"):
        hub.push(tmp_path, name)
    assert FakeApi.calls == []
