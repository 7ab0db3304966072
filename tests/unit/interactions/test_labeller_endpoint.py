"""An endpoint on this machine: what is sent, what is read, what is tried again, what is kept."""

import json
import logging
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from launch import prepare_data
from mm_moe.data.interactions.labeller_endpoint import Endpoint, answer_scores
from mm_moe.data.interactions.question import Question
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts

KEY = "sk-very-secret"
YES_NO = Question("Is it sarcastic?", ("No", "Yes"))


def answer(**tokens):
    top = [{"token": token, "logprob": math.log(share)} for token, share in tokens.items()]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


@pytest.fixture
def server():
    """Answers with the next of `replies`: (status, body); the last one repeats."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            here.seen.append((self.path, dict(self.headers), json.loads(body)))
            status, reply = here.replies.pop(0) if len(here.replies) > 1 else here.replies[0]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            text = reply if isinstance(reply, str) else json.dumps(reply)
            self.wfile.write(text.encode())

        def log_message(self, *_):
            return

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.seen, here.replies = [], [(200, answer(Yes=0.75, No=0.2))]
    here.url = f"http://127.0.0.1:{here.server_address[1]}/v1"
    thread = threading.Thread(target=here.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield here
    here.shutdown()
    here.server_close()
    thread.join()


def endpoint(server, **options):
    waits = []
    fields = {"key": KEY, "sleep": waits.append} | options
    return Endpoint(server.url, "big-model", YES_NO, **fields), waits


def test_a_text_is_asked_and_the_first_token_is_read(server):
    one, _ = endpoint(server)
    assert one.scores("Great.") == pytest.approx([0.2, 0.75])
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["temperature"], body["max_tokens"], body["top_logprobs"]) == (0, 1, 5)
    assert "Great." in body["messages"][0]["content"]
    assert KEY not in repr(one)


def test_an_image_goes_along_as_png(server):
    endpoint(server)[0].scores(Image.new("RGB", (2, 2)))
    image, text = server.seen[0][2]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"].startswith("Is it sarcastic?\n\nAnswer")


def test_tokens_count_for_the_one_answer_they_begin():
    tokens = {" yes": 0.5, "Ye": 0.1, "YES": 0.05, "": 0.1, "Maybe": 0.2}
    assert answer_scores(answer(**tokens), ("No", "Yes")) == pytest.approx([0, 0.65])
    assert np.isnan(answer_scores(answer(Maybe=0.9), ("No", "Yes"))).all()
    # "ba" may become either word and counts for none
    assert answer_scores(answer(ba=0.5, ban=0.2), ("bat", "band")) == pytest.approx([0, 0.2])


def test_failures_that_pass_are_tried_again_with_longer_waits(server):
    server.replies = [(503, "busy"), (429, "slow"), (200, "{cut"), (200, answer(No=0.5))]
    one, waits = endpoint(server)
    assert one.scores("x") == pytest.approx([0.5, 0])
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("replies", "kind", "message"),
    [
        ([(500, KEY)], DataError, "no answer in 2 attempts .last: status 500"),
        ([(401, f"wrong key {KEY}")], ConfigError, "status 401 .the key is missing or wrong"),
        ([(302, "")], ConfigError, "refuses the request with status 302"),
        ([(200, {"choices": []})], DataError, "must support logprobs"),
    ],
)
def test_failures_that_stay_tell_no_secret(server, caplog, replies, kind, message):
    server.replies = replies
    with caplog.at_level(logging.DEBUG), pytest.raises(kind, match=message) as error:
        endpoint(server, attempts=2)[0].scores("x")
    assert KEY not in str(error.value) + caplog.text


def test_addresses_that_are_none(server):
    wrong_ports = ("http://host:99999/v1", "http://host:0/v1", "http://[x/v1")
    for url in ("file:///etc/passwd", "localhost:80", "http://", *wrong_ports):
        with pytest.raises(ConfigError, match="must be an address"):
            Endpoint(url, "m", YES_NO)
    with pytest.raises(ConfigError, match="no user, password or query"):
        Endpoint("http://me:word@host/v1", "m", YES_NO)
    with pytest.raises(ConfigError, match=r"--timeout_s \(nan\) above 0"):
        Endpoint("http://host/v1", "m", YES_NO, timeout_s=float("nan"))
    with pytest.raises(ConfigError, match=r"--attempts \(0\)"):
        Endpoint(server.url, "m", YES_NO, attempts=0)


def test_the_program_keeps_answers_and_goes_on(server, tmp_path, monkeypatch, capsys):
    raw, out = raw_layouts.mustard_original(tmp_path / "raw"), str(tmp_path / "out")
    assert prepare_data.main(["mustard", "--source", str(raw), "--output", out]) == 0
    monkeypatch.setenv("MY_KEY", KEY)
    words = ["--dataset", "mustard", "--data_dir", out, "--output", str(tmp_path / "table")]
    words += ["--labeller", "endpoint", "--url", server.url, "--served_model", "m"]
    words += ["--key_variable", "MY_KEY", "--requests", "1"]
    good = (200, answer(Yes=0.9, No=0.05))
    server.replies = [*[good] * 5, (401, "stop")]
    with pytest.raises(ConfigError, match="status 401"):
        prepare_data.main(["interactions", *words])
    server.replies, server.seen[:] = [good], []
    assert prepare_data.main(["interactions", *words]) == 0
    assert len(server.seen) == 2 * 12 - 5  # 12 rows, utterance and context; 5 were known
    table = InteractionTable.load(tmp_path / "table" / "interactions.parquet")
    assert (table.predictions["text"] == 1).all()
    files = [path for path in (tmp_path / "table").rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert KEY not in capsys.readouterr().out
