import numpy as np
import pytest

from mm_moe.data.events import (
    EVENTS,
    EventStatistics,
    check_events,
    event_entry,
    pack_events,
    read_events,
)
from mm_moe.errors import DataError


def test_events_are_sorted_by_time_variable_and_value():
    events = pack_events([2.0, 0.5, 0.5, 0.5], [0, 1, 0, 1], [9.0, 4.0, 3.0, 2.0])
    assert events.tolist() == [[0.5, 0, 3], [0.5, 1, 2], [0.5, 1, 4], [2.0, 0, 9]]
    assert events.dtype == np.float32
    assert read_events(events.tobytes()).tolist() == events.tolist()


def test_bytes_of_something_else_are_refused():
    with pytest.raises(DataError, match="16 bytes are no events"):
        read_events(b"0" * 16)
    with pytest.raises(DataError, match=r"\(4, 2\)"):
        read_events(np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (np.zeros((0, 3)), "without an event"),
        ([[0, 0, np.nan]], "NaN"),
        ([[0, 2, 1.0]], "outside the 2 known"),
        ([[0, 0.5, 1.0]], "outside the 2 known"),
        ([[-1, 0, 1.0]], "before the start"),
        ([[3, 0, 1.0], [2, 0, 1.0]], "out of order"),
        ([[0.0, 1.0]], "shape"),
    ],
)
def test_what_is_wrong_with_events_is_told_without_a_value(events, said):
    assert said in check_events(np.asarray(events), num_variables=2)
    assert check_events(np.asarray([[0, 1, 37.5]]), num_variables=2) is None


def test_statistics_by_variable_over_rows():
    statistics = EventStatistics(3)
    statistics.add(pack_events([0, 1, 2], [0, 0, 1], [1.0, 2.0, 5.0]))
    statistics.add(pack_events([0, 1], [0, 1], [6.0, 5.0]))
    # variable 0: 1, 2, 6 -> mean 3, variance (4 + 1 + 9) / 3; variable 1 is constant, 2 unseen
    record = statistics.record()
    assert record["mean"] == pytest.approx([3, 5, 0])
    assert record["std"] == pytest.approx([(14 / 3) ** 0.5, 1, 1])
    assert statistics.rows_V.tolist() == [2, 2, 0]
    entry = event_entry(["a", "b", "c"], statistics=record, length=statistics.length, hours=48)
    assert (entry["width"], entry["length"], entry["mean"]) == (3, 3, [0, 0, 0])
    assert entry[EVENTS]["variables"] == ["a", "b", "c"]
    assert entry[EVENTS]["hours"] == 48
