"""What `launch/submit_slurm.py` writes and refuses; a real Slurm is in `test_slurm.py`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from refusals import refused

from launch import check_slurm, submit_slurm
from mm_moe.errors import ConfigError, MMMoEError, ParallelismError

FOLDER = Path(submit_slurm.__file__).with_name("slurm")
EXAMPLE = ("--nodes", "2", "--gpus_per_node", "8", "--setup", "source .venv/bin/activate")
TRAIN = ("--deepspeed", "ds_configs/zero2.json", "--bf16", "true", "--global_batch_size", "256")


def script_of(*argv: str) -> str:
    return submit_slurm.prepare([*argv])[2]


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines()]
    return dict(line.partition("=")[::2] for line in lines if line != "" and "#SBATCH" not in line)


def test_the_file_to_edit_is_what_the_template_makes(here):
    options, run, _ = submit_slurm.prepare(
        [*EXAMPLE, "--dry_run", "--job_name", "mm_moe", "--", *TRAIN, "--output_dir", "runs/mm_moe"]
    )
    made = submit_slurm.render(options, list(TRAIN), program="launch/train.py", run=run)
    assert (FOLDER / "multi_node.sbatch").read_text() == made


def test_flags_become_options(here):
    own = ("--nodes", "3", "--gpus_per_node", "4", "--cpus_per_task", "6", "--mem", "90G")
    own += ("--time", "1-12", "--partition", "gpu", "--account", "p7", "--signal_before_s", "300")
    own += ("--sbatch=--qos=high", "--job_name", "clip", "--dry_run", "--master_addr", "10.0.0.1")
    script = script_of(*own, "--", "--output_dir", "a b/c", "--global_batch_size", "24")
    options = directives(script)
    wanted = {"nodes": "3", "ntasks-per-node": "4", "gres": "gpu:4", "cpus-per-task": "6"}
    wanted |= {"mem": "90G", "time": "1-12", "partition": "gpu", "account": "p7", "qos": "high"}
    wanted |= {"signal": "B:USR1@300", "requeue": "", "open-mode": "append", "job-name": "clip"}
    wanted |= {"output": '"a b/c-slurm-%j.log"'}
    assert {key: options.get(key) for key in wanted} == wanted
    assert "\nrun='a b/c'\n" in script
    assert "\nexport MASTER_ADDR=10.0.0.1\n" in script
    assert script.count("output_dir") == 2  # passed on once, and explained once
    on_cpu = script_of("--gpus_per_node", "0", "--dry_run", "--", "--output_dir", "run")
    assert "gres" not in directives(on_cpu)
    assert directives(on_cpu)["ntasks-per-node"] == "1"


def test_it_is_bash_whatever_the_flags_say(here):
    words = (
        "--output_dir",
        "a'b $(touch bad)",
        "--missing_seed",
        "7",
        "--run_name",
        "x; touch bad",
    )
    script = script_of("--dry_run", "--gpus_per_node", "0", "--", *words)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    start, end = script.index("# Every start"), script.index("export PATH")
    shown = f'{script[start:end]}\nprintf "%s\\n" "$run" "${{train[@]}}"'
    done = subprocess.run(["bash"], input=shown, text=True, capture_output=True, check=False)
    assert done.stdout.splitlines() == [words[1], *words[2:]]
    assert not Path("bad").exists()


def test_a_run_without_a_name_gets_one_that_stays(here):
    _, run, script = submit_slurm.prepare(["--dry_run", "--gpus_per_node", "0"])
    assert run.parent == Path("runs")
    assert run.name.startswith("emoji_replay-2")
    assert f"\nrun={run}\n" in script
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("04:00:00", 14400), ("2-12", 216000), ("1-0:30", 88200)],
)
def test_time_limits(text, seconds):
    assert check_slurm.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes (0) must be at least 1"),
        (["--gpus_per_node", "-1"], "--gpus_per_node (-1) must be at least 0"),
        (["--max_requeues", "-1"], "--max_requeues (-1)"),
        (["--time", "4h"], "--time '4h' is no time limit"),
        (["--time", "1"], "--signal_before_s (120) must be less than --time 1 (60 s)"),
        (["--partition", "a b"], "--partition 'a b' cannot be"),
        (["--mem", "lots"], "--mem 'lots' cannot be; write one such as 64G"),
        (["--processes_per_node", "2"], "--processes_per_node (2) must be --gpus_per_node (8)"),
        (["--sbatch=qos"], "--sbatch 'qos' must be one option"),
        (["--setup", "a\nb"], "--setup must be one line"),
        (["--bf16", "true"], "'--bf16' is no flag of the job"),
        (["--", "--hub_token", "hf_x"], "--hub_token would stand in the job's script"),
        (["--", "--run_name", "hf_secret"], "what looks like a token"),
        (["--", "--resume_from_checkpoint", "checkpoint-5"], "would go back to it"),
        (["--", "--learning_rat", "1"], "learning_rate"),
        (["--", "--output_dir", 'a"b'], "quotes"),
        (["--", "--deepspeed", "absent.json"], "absent.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_it_refuses(here, words, said):
    answer = refused(ConfigError, "--dry_run", *words, program=submit_slurm)
    assert said in answer
    assert "hf_" not in answer


def test_experts_must_fit_nodes_times_gpus(here):
    own = ("--dry_run", "--nodes", "3", "--gpus_per_node", "2")
    argv = (*own, "--", "--ep_size", "4", "--global_batch_size", "24")
    assert "processes (6)" in refused(ParallelismError, *argv, program=submit_slurm)


def test_another_runs_folder_is_refused_and_gone_on_with_when_asked(here):
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    argv = ("--dry_run", "--gpus_per_node", "0", "--", "--output_dir", "run")
    assert "already holds another run" in refused(ConfigError, *argv, program=submit_slurm)
    script = script_of(*argv, "--resume_from_checkpoint", "auto")
    assert script.count("--resume_from_checkpoint auto") == 1
    assert "latest" not in script
    latest = (*argv, "--resume_from_checkpoint", "latest")
    with pytest.raises(MMMoEError, match="no good checkpoint"):
        submit_slurm.prepare([*latest])


def test_without_slurm_nothing_is_submitted(here, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    argv = ("--gpus_per_node", "0")
    assert "there is no sbatch here" in refused(ConfigError, *argv, program=submit_slurm)
    assert submit_slurm.main([*argv, "--dry_run", "--", "--output_dir", "/dev/shm/run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("#!/bin/bash\n")
    assert "can all nodes see --output_dir '/dev/shm/run'" in err
