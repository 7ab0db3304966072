"""Bytes from a server that fails: the same bytes, or an error; never fewer."""

import copy
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mm_moe.data import retrying
from mm_moe.data.retrying import GoneError, Remote, RemoteError
from mm_moe.data.web import retry_after_s, shown_url
from mm_moe.errors import ConfigError
from tests.flaky_server import FAULTS, serving

pytestmark = pytest.mark.faults
BODY = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path):
    (tmp_path / "x.bin").write_bytes(BODY)
    with serving(tmp_path) as server:
        yield server


def quick(**fields):
    return Remote(**{"timeout_s": 10, "first_wait_s": 0.001} | fields)


def patience(fault):
    """Short where the fault is met by the timeout itself."""
    return 0.3 if fault in ("hang", "drip") else 10


class Once:
    """A server's fault for one request only, the `at`-th."""

    def __init__(self, server, fault, at=0):
        self.calls, self.server = -1, server
        self.fault, self.at = fault, at
        server.fault = self

    def __call__(self, path):
        self.calls += 1
        return self.fault if self.calls == self.at else None


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "short_length"])
def test_a_body_comes_whole_after_one_fault(server, fault):
    Once(server, fault)
    remote = quick(timeout_s=patience(fault))
    assert remote.read(f"{server.url}/x.bin") == BODY
    assert remote.num_retries >= (fault != "bad_range")  # no range was asked for


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_is_never_read_short(server, has_ranges, fault):
    server.has_ranges = has_ranges
    for at in (0, 1, 2):  # the first question, the second, the body
        Once(server, fault, at=at)
        remote = quick(timeout_s=patience(fault))
        with remote.open(f"{server.url}/x.bin") as file:
            assert file.read() == BODY
            file.seek(-5, 2)
            assert file.read() == BODY[-5:]


def test_blocks_of_a_large_file(server, monkeypatch):
    monkeypatch.setattr(retrying, "BLOCK", 1000)
    server.share, server.faults = 0.3, ("busy", "cut", "bad_range", "short_length")
    remote = quick(retries=20)
    with remote.open(f"{server.url}/x.bin") as file:
        assert file.read() == BODY
        file.seek(2500)
        assert file.read(1000) == BODY[2500:3500]
    assert remote.num_retries > 0


def test_parquet_by_ranges_reads_only_the_columns_that_it_needs(tmp_path, server):
    blob = [random.Random(n).randbytes(40_000) for n in range(20)]
    pq.write_table(pa.table({"n": list(range(20)), "blob": blob}), tmp_path / "t.parquet")
    with quick().open(f"{server.url}/t.parquet") as file:
        assert pq.read_table(file, columns=["n"])["n"].to_pylist() == list(range(20))
    assert server.sent < 200_000 < 800_000 < (tmp_path / "t.parquet").stat().st_size


@pytest.mark.parametrize(
    ("status", "kind"), [(404, GoneError), (410, GoneError), (403, RemoteError)]
)
def test_a_refusal_ends_at_once_and_tells_no_secret(server, status, kind):
    server.status["/x.bin"] = status
    url = server.url.replace("//", "//carol:hushed@") + "/x.bin?token=secret#part"
    remote = quick()
    with pytest.raises(
        RemoteError, match=rf"{server.url}/x.bin cannot .* {status} .* 1 try"
    ) as told:
        remote.read(url)
    assert type(told.value) is kind
    assert not any(word in str(told.value) for word in ("carol", "hushed", "secret", "\n"))
    assert remote.num_retries == 0
    assert server.headers_seen[0]["Authorization"] == "Basic Y2Fyb2w6aHVzaGVk"  # of carol:hushed


def test_retries_end(server):
    server.share, server.faults = 1.0, ("busy",)
    remote = quick(retries=3)
    with pytest.raises(RemoteError, match=r"status 503, 4 tries in .*--stream_retries \(3\)"):
        remote.read(f"{server.url}/x.bin")
    assert (remote.num_retries, server.asked["/x.bin"]) == (3, 4)
    with pytest.raises(RemoteError, match="ConnectionRefusedError, 2 tries"):
        quick(retries=1).read("http://127.0.0.1:9/x")


def test_a_length_that_nobody_tells_is_refused_for_a_table(server):
    server.tells_length = server.has_ranges = False
    with pytest.raises(RemoteError, match="tells no length"), quick().open(f"{server.url}/x.bin"):
        pass
    assert quick().read(f"{server.url}/x.bin") == BODY  # a picture: its decoder will know


def test_a_file_that_changed_is_refused(tmp_path, server):
    remote = quick(retries=1)
    assert remote.about(f"{server.url}/x.bin").size == len(BODY)
    (tmp_path / "x.bin").write_bytes(BODY + b"more")
    with (
        pytest.raises(RemoteError, match="another range, or another length, 2 tries"),
        remote.open(f"{server.url}/x.bin") as file,
    ):
        file.read()


def test_an_empty_file(tmp_path, server):
    (tmp_path / "none").write_bytes(b"")
    with quick().open(f"{server.url}/none") as file:
        assert file.read() == b""


def test_waits_grow_and_leave_the_seeded_generators_alone(server, monkeypatch):
    waits = []
    monkeypatch.setattr(retrying.time, "sleep", waits.append)
    server.share, server.faults = 1.0, ("busy",)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(RemoteError):
        Remote(retries=9, timeout_s=5).read(f"{server.url}/x.bin")
    # a half to the whole of 0.25, 0.5, 1, ... 16, then 30 s
    tops = [min(0.25 * 2**k, 30) for k in range(9)]
    assert all(top / 2 <= wait <= top for wait, top in zip(waits, tops, strict=True))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_copies_count_together_and_pickle():
    remote = quick()
    assert copy.deepcopy(remote) is remote
    assert pickle.loads(pickle.dumps(remote)).timeout_s == 10


def test_small_parts():
    assert shown_url("https://u:p@host:8/a/b?x=1#y") == "https://host:8/a/b"
    assert [retry_after_s(value) for value in (None, "7", "soon")] == [0, 7, 0]
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for fields in ({"retries": -1}, {"timeout_s": 0}):
        with pytest.raises(ConfigError, match="must be"):
            Remote(**fields)
