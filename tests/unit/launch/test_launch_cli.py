"""Recipes and flags become one set of values; expected failures become one line and status 2."""

import json
from pathlib import Path

import pytest

from launch import cli
from launch.checks import settle_batch
from launch.cli import RecipeParser, read_recipe, recipe_argv, run_program
from launch.finish import without_flags, without_secrets
from mm_moe.errors import ConfigError, DataError

RECIPE = """\
# Every kind of value.
num_experts: 8
moe_layers_idx: [0, 3]
lock_image: true
lock_text: false
data_dir: null
prompt_config: {length: 4, roles: [a, b]}
learning_rate: 1.0e-3
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


def values(*argv: str):
    return RecipeParser().namespace(list(argv))


def test_a_recipe_sets_flags_of_every_kind(recipe):
    found = values("--config", recipe)
    assert found.num_experts == [8]
    assert found.moe_layers_idx == [0, 3]
    assert (found.lock_image, found.lock_text) == (True, False)
    assert found.data_dir is None
    assert json.loads(found.prompt_config) == {"length": 4, "roles": ["a", "b"]}
    assert found.learning_rate == 1e-3
    assert found.config == recipe


def test_a_typed_flag_beats_the_recipe_in_either_spelling(recipe):
    found = values("--num-experts", "2", "--config", recipe, "--lock_image=false")
    assert found.num_experts == [2]
    assert found.lock_image is False
    assert found.moe_layers_idx == [0, 3]


def test_without_flags_it_is_the_default_recipe():
    found = values()
    assert found.config == cli.DEFAULT_RECIPE
    assert (found.dataset, found.prompt, found.missing_ratio) == ("emoji", "replay", 0.5)


def test_the_options_of_a_prompt_do_not_outlive_it(recipe):
    assert values().prompt_config == values("--prompt", "replay").prompt_config
    assert json.loads(values().prompt_config) == {"length": 2}
    assert values("--prompt", "none").prompt_config is None
    typed = values("--prompt", "missing_aware", "--prompt_config", '{"length": 3}')
    assert json.loads(typed.prompt_config) == {"length": 3}
    # A recipe that names no prompt means its options for the one that is typed.
    assert values("--config", recipe, "--prompt", "replay").prompt_config is not None


def test_the_options_of_a_fill_do_not_outlive_it():
    recipe = ("--config", "physionet2012")
    assert values(*recipe).fill_config == values(*recipe, "--fill", "retriever").fill_config
    assert values(*recipe).fill_config is not None
    assert values(*recipe, "--fill", "zero").fill_config is None


@pytest.mark.parametrize(
    "name",
    ["emoji_replay", "finetune/recipes/emoji_replay.yaml", "pretrain/recipes/small_clip.yaml"],
)
def test_a_recipe_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.find_recipe(name).is_file()


def test_an_empty_recipe_sets_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_recipe(str(tmp_path / "empty.yaml")) == {}
    assert recipe_argv({"data_dir": None}) == []


def test_no_flag_is_known_twice():
    flags = RecipeParser().flags
    assert len(flags) == len(set(flags))
    assert {"router", "ep_size", "dataset", "prompt", "deepspeed", "output_dir"} <= set(flags)
    assert "help" not in flags


def test_half_a_flag_is_no_flag():
    with pytest.raises(ConfigError, match=r"'--num_exp'.*num_experts"):
        values("--num_exp", "4")


def test_the_flags_become_the_dataclasses(recipe, tmp_path):
    parser = RecipeParser()
    argv = ["--config", recipe, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    settings = parser.build(parser.namespace(argv))
    assert settings.moe.num_experts == [8]
    assert settings.model.lock_image is True
    assert settings.training.learning_rate == 1e-3
    assert settings.run.config == recipe
    assert not (tmp_path / "run").exists()


def test_a_combination_that_the_trainer_refuses_is_an_error_of_the_user(tmp_path):
    parser = RecipeParser()
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--load_best_model_at_end", "true"]
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        parser.build(parser.namespace(argv))


# ---- the batch -------------------------------------------------------------------------------


def batch(monkeypatch, world: int, *argv: str) -> int:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = values(*argv)
    settle_batch(found, list(argv))
    return found.per_device_train_batch_size


def test_the_global_batch_is_shared_by_processes_and_accumulation(monkeypatch):
    assert batch(monkeypatch, 1) == 64  # what the default recipe says
    assert batch(monkeypatch, 2) == 32
    argv = ("--global_batch_size", "96", "--gradient_accumulation_steps", "3")
    assert batch(monkeypatch, 4, *argv) == 8


def test_a_typed_batch_per_process_beats_the_recipe(monkeypatch):
    assert batch(monkeypatch, 2, "--per_device_train_batch_size", "5") == 5
    assert batch(monkeypatch, 2, "--per-device-train-batch-size=5") == 5


def test_two_typed_batches_may_agree(monkeypatch):
    argv = ("--global_batch_size", "16", "--per_device_train_batch_size", "8")
    assert batch(monkeypatch, 2, *argv) == 8


# ---- secrets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["--seed", "1", "--hub_token", "abc", "--bf16"], ["--seed", "1", "--bf16"]),
        (["--hub-token=abc", "--seed", "1"], ["--seed", "1"]),
        (["--seed", "1", "hf_abc"], ["--seed", "1"]),
        (["--data_dir", "/data/hf_cache/x"], ["--data_dir", "/data/hf_cache/x"]),
    ],
)
def test_no_token_is_written_down(argv, kept):
    assert without_secrets(argv) == kept


# ---- the program -----------------------------------------------------------------------------


@pytest.fixture
def status(monkeypatch):
    """Exit status of `run_program` around a `main`, without changing this process' loggers."""
    monkeypatch.setattr(cli, "quiet", lambda: None)
    monkeypatch.setattr(cli.sys, "argv", ["program", "--flag"])
    monkeypatch.delenv("RANK", raising=False)

    def of(main) -> int:
        with pytest.raises(SystemExit) as ended:
            run_program(main)
        return ended.value.code

    return of


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_success_passes_the_flags_and_the_status_through(status):
    seen = []
    assert status(lambda argv: seen.append(argv) or 0) == 0
    assert seen == [["--flag"]]


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_an_expected_failure_is_one_line_and_status_2(status, capsys, kind):
    assert status(raising(kind("x (3) must be even; try 4."))) == 2
    assert capsys.readouterr() == ("", "error: x (3) must be even; try 4.\n")


def test_only_the_first_process_speaks(status, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert status(raising(ConfigError("x"))) == 2
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_has_its_own_status(status):
    assert status(raising(KeyboardInterrupt())) == 130


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "quiet", lambda: None)
    with pytest.raises(ZeroDivisionError):
        run_program(raising(ZeroDivisionError()))


def test_every_program_of_the_folder_ends_this_way():
    programs = [
        path for path in Path(cli.ROOT, "launch").glob("*.py") if "argv" in path.read_text()
    ]
    mains = [path for path in programs if '__name__ == "__main__"' in path.read_text()]
    assert {path.stem for path in mains} >= {"train", "export", "evaluate_run"}
    ends = ("run_program(main)", "run_program(lambda argv: main(argv, early=early))")
    assert all(any(end in path.read_text() for end in ends) for path in mains)


def test_dropped_flags_take_their_values_along():
    argv = ["--seed", "1", "--local_rank=0", "--output-dir", "there", "--moe_layers_idx", "0", "1"]
    kept = without_flags(argv, ("local_rank", "output_dir"))
    assert kept == ["--seed", "1", "--moe_layers_idx", "0", "1"]
