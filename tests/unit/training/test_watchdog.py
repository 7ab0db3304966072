"""The watchdog counts by hand; a hang is written down and ends the process."""

import os
import threading
import time
from types import SimpleNamespace

import pytest

from mm_moe.errors import EXIT_LOST_RANK
from mm_moe.training import watchdog as watching
from mm_moe.training.watchdog import Heartbeat, Watchdog, collective_timeout_s


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def watched(tmp_path, limit_s=10.0):
    clock = Clock()
    return Watchdog(tmp_path, limit_s=limit_s, clock=clock), clock


def ticks(watchdog, clock, count, *, apart_s=1.0):
    """How often the watchdog says that the limit is passed."""
    late = 0
    for _ in range(count):
        late += watchdog.tick()
        clock.now += apart_s
    return late


def test_the_limit_is_reached_at_the_second_that_it_names(tmp_path):
    watchdog, clock = watched(tmp_path)
    watchdog.beat(watching.STEP)
    assert ticks(watchdog, clock, 10) == 0  # the first tick counts nothing: 9 s
    assert watchdog.tick()  # 10 s


def test_no_slow_step_below_the_limit_is_taken_for_a_hang(tmp_path):
    watchdog, clock = watched(tmp_path)
    for step in range(100):
        watchdog.beat(watching.STEP, step=step)
        assert ticks(watchdog, clock, 9) == 0


def test_time_in_which_the_process_itself_did_not_run_is_not_counted(tmp_path):
    watchdog, clock = watched(tmp_path)
    watchdog.beat(watching.STEP)
    watchdog.tick()
    clock.now += 3600.0  # the whole job was suspended
    assert not watchdog.tick()  # 2 s: twice the period
    assert ticks(watchdog, clock, 8) == 0  # 2 to 9 s
    assert watchdog.tick()


def test_start_evaluation_and_saving_may_take_longer(tmp_path):
    watchdog, clock = watched(tmp_path)
    assert watchdog.allowed_s == 1800  # starts slowly; at least half an hour
    watchdog.beat(watching.SAVE, slow=True)
    assert ticks(watchdog, clock, 1800) == 0
    assert watchdog.tick()
    assert Watchdog(tmp_path, limit_s=1000).allowed_s == 4000


def phases(watchdog, state, control, events):
    """Phase and slowness after each event of the training loop."""
    heartbeat, found = Heartbeat(watchdog), []
    for event in events:
        getattr(heartbeat, event)(SimpleNamespace(ddp_timeout=1800), state, control)
        found.append((watchdog.phase, watchdog.allowed_s == 1800))
        if event == "on_step_begin":
            state.global_step += 1
    return found


def test_the_heartbeat_knows_what_the_loop_does(tmp_path):
    state = SimpleNamespace(global_step=7)  # resumed: the first step is slow all the same
    control = SimpleNamespace(should_evaluate=True, should_save=True)
    events = "train_begin step_begin substep_end step_end evaluate save step_begin train_end"
    found = phases(
        Watchdog(tmp_path, limit_s=10),
        state,
        control,
        [f"on_{event}" for event in events.split()],
    )
    step, data = (watching.STEP, False), (watching.DATA, False)
    evaluate, save = (watching.EVALUATE, True), (watching.SAVE, True)
    assert found[:2] == [(watching.START, True), (watching.STEP, True)]
    assert found[2:] == [step, evaluate, save, data, step, (watching.END, True)]


def test_data_are_waited_for_with_the_short_limit(tmp_path):
    state, control = SimpleNamespace(global_step=3), SimpleNamespace()
    control.should_evaluate = control.should_save = False
    found = phases(Watchdog(tmp_path, limit_s=10), state, control, ["on_step_end"])
    assert found == [(watching.DATA, False)]


def test_a_hang_writes_the_stacks_and_leaves_with_its_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    left = threading.Event()
    statuses = []

    def leave(status):
        statuses.append(status)
        left.set()

    watchdog = Watchdog(tmp_path, limit_s=0.2, leave=leave)
    watchdog.beat(watching.DATA, step=5)
    watchdog.start()
    assert left.wait(60)
    assert statuses[0] == EXIT_LOST_RANK
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: rank 3 stood still")
    assert "\n" not in said
    assert "'waiting for data' at step 5" in said
    assert "--hang_timeout_s" in said
    stacks = (tmp_path / "stacks-3.txt").read_text()
    assert "test_a_hang_writes_the_stacks" in stacks
    assert "'waiting for data'" in stacks


def test_a_folder_that_cannot_be_written_still_ends_the_process(tmp_path, capsys):
    statuses = []
    watchdog = Watchdog(tmp_path / "gone", limit_s=1, leave=statuses.append)
    with pytest.raises(OSError):
        watchdog.give_up()
    assert statuses == [EXIT_LOST_RANK]


def test_off_means_no_thread(tmp_path):
    before = threading.active_count()
    Watchdog(tmp_path, limit_s=0).start()
    assert threading.active_count() == before


def test_a_stopped_watchdog_ends_nothing(tmp_path):
    watchdog = Watchdog(tmp_path, limit_s=0.1, leave=lambda status: os.abort())
    watchdog.beat(watching.STEP)
    watchdog.start()
    watchdog.stop()
    deadline = time.monotonic() + 60
    while any(thread.name == "watchdog" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_collectives_wait_longer_than_the_watchdog_unless_told():
    assert collective_timeout_s(1800, ddp_timeout_s=1800) == 4 * 1800 + 60
    assert collective_timeout_s(5, ddp_timeout_s=1800) == 1800 + 60
    assert collective_timeout_s(1800, ddp_timeout_s=90) == 90  # the user's own
    assert collective_timeout_s(0, ddp_timeout_s=1800) == 1800
