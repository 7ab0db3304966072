"""The flags of a push: refused before training, and the token taken out of everything."""

import argparse
import sys

import pytest

from launch import check_hub
from mm_moe.checkpoint import hub
from mm_moe.checkpoint.hub import Access, HubTarget
from mm_moe.errors import ConfigError

TOKEN = "hf_" + "Secret" * 5


def flags(**fields) -> argparse.Namespace:
    plain = {
        "push_to_hub": True,
        "hub_model_id": "org/model",
        "hub_strategy": "every_save",
        "hub_always_push": False,
        "hub_private_repo": None,
        "hub_revision": None,
        "hub_token": None,
        "hub_timeout_s": 60.0,
        "max_shard_size": "5GB",
    }
    return argparse.Namespace(**{**plain, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hub_model_id": None}, "--hub_model_id ORG/NAME"),
        ({"hub_model_id": "a/b/c"}, "ORG/NAME"),
        ({"hub_strategy": "all_checkpoints"}, "Take end, every_save, checkpoint"),
        ({"hub_always_push": True}, "--hub_always_push"),
        ({"hub_timeout_s": 0.0}, "--hub_timeout_s 0.0"),
        ({"hub_timeout_s": float("nan")}, "--hub_timeout_s nan"),
        ({"max_shard_size": "large", "push_to_hub": False}, "--max_shard_size 'large'"),
    ],
)
def test_what_no_push_can_honour(fields, said):
    with pytest.raises(ConfigError) as caught:
        check_hub.check_hub_flags(flags(**fields))
    assert said in str(caught.value)


@pytest.mark.parametrize("typed", [["--hub_token", TOKEN], [f"--hub-token={TOKEN}"]])
def test_the_token_is_taken_out_of_the_settings_and_the_command_line(typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1", *typed, "--bf16"])
    values = flags(hub_token=TOKEN)
    target = check_hub.hub_target(values)
    assert target is not None
    assert target.token == TOKEN
    assert sys.argv == ["train.py", "--seed", "1", "--bf16"]
    assert TOKEN not in str(values)
    assert values.push_to_hub is False  # the Trainer pushes nothing by itself


def test_no_token_at_all(monkeypatch):
    monkeypatch.setattr(check_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="there is no token for org/model; set HF_TOKEN"):
        check_hub.hub_target(flags())
    assert check_hub.hub_target(flags(push_to_hub=False)) is None
    monkeypatch.setattr(check_hub, "get_token", lambda: TOKEN)
    assert check_hub.hub_target(flags()).token == TOKEN


@pytest.mark.parametrize(
    ("access", "said"),
    [
        (Access("known", "", ("me", "org")), ""),
        (Access("known", "", ("me",)), "belongs to me, which may not be able to write to org"),
        (Access("unreachable", "no connection"), "cannot be asked now (no connection)"),
    ],
)
def test_a_hub_that_is_not_there_is_a_warning(access, said, monkeypatch, caplog):
    monkeypatch.setattr(hub, "check_token", lambda target: access)
    check_hub.refuse_wrong_token(HubTarget("org/model", token=TOKEN))
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_a_wrong_token_is_refused(monkeypatch):
    monkeypatch.setattr(hub, "check_token", lambda target: Access("refused", "answered 401; x"))
    with pytest.raises(ConfigError, match=r"does not take this token \(answered 401\)"):
        check_hub.refuse_wrong_token(HubTarget("org/model", token=TOKEN))
