"""The process that speaks with the Hub: one job as a JSON line in, events as JSON lines out.

    {"event": "ready"}, {"event": "try", "number": 1}, {"event": "again", "reason": ...},
    {"event": "done", "state": ..., "reason": ..., ...}

It ends with the process that started it. A push is one commit: `HfApi.upload_folder` is not used
because it makes several where the Xet library is installed (huggingface_hub 2.4), between which a
crash would leave half a model visible.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

AGAIN = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # what may go away by itself
OTHER_SHARDS = (".safetensors", ".safetensors.index.json")
CONNECTION_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
LONGEST_REASON = 300


def causes(error: BaseException | None) -> Iterable[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: Exception) -> tuple[str, bool, float]:
    """Why a try failed, whether another may work, and the seconds that the Hub asks to wait."""
    for cause in causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "the environment says HF_HUB_OFFLINE", False, 0.0
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _explain_answer(cause)
        library = type(cause).__module__.split(".")[0]
        if library in CONNECTION_LIBRARIES or isinstance(cause, ConnectionError | TimeoutError):
            return _short(f"no connection: {type(cause).__name__}: {cause}"), True, 0.0
    # The Xet library reports its connections as RuntimeError.
    return _short(f"{type(error).__name__}: {error}"), isinstance(error, RuntimeError), 0.0


def _explain_answer(error: HfHubHTTPError) -> tuple[str, bool, float]:
    status = error.response.status_code
    reason = f"the Hub answered {status}"
    if error.server_message:
        reason += f" ({error.server_message})"
    if status in (401, 403):
        reason += "; take a token that may write there (HF_TOKEN)"
    elif status == 404:
        reason += "; is there such a user or organisation, and may the token see it?"
    asked = error.response.headers.get("Retry-After", "")
    return _short(reason), status in AGAIN, float(asked) if asked.isdigit() else 0.0


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]


def stale_files(remote: Iterable[str], *, new: Iterable[str], replaces: list[str]) -> list[str]:
    """The files of a repository that would spoil what is pushed now.

    At the top ("") these are weights of another sharding, which `from_pretrained` would prefer;
    in a folder that is replaced ("last-checkpoint/"), everything else.
    """
    gone = []
    for name in sorted(set(remote) - set(new)):
        at_top = "" in replaces and "/" not in name and name.endswith(OTHER_SHARDS)
        if at_top or any(below and name.startswith(below) for below in replaces):
            gone.append(name)
    return gone


def push_once(api: HfApi, job: dict[str, Any]) -> dict[str, str]:
    """Create what is not there, upload, and commit once."""
    made = api.create_repo(job["repo_id"], private=job["private"], exist_ok=True)
    repo, revision = made.repo_id, job["revision"]
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    remote = api.list_repo_files(repo, revision=revision)
    stale = stale_files(remote, new=job["files"], replaces=job["replaces"])
    operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in stale]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
        for name, file in job["files"].items()
    ]
    done = api.create_commit(
        repo, operations, commit_message=job["message"], revision=revision, num_threads=2
    )
    return {"url": f"{api.endpoint}/{repo}", "commit": done.oid}


def push(job: dict[str, Any]) -> dict[str, Any]:
    """Try until it works, is refused, or the tries are used up."""
    api = HfApi(token=job["token"])
    waits = [*job["waits_s"], None]
    reason = ""
    for number, wait_s in enumerate(waits, start=1):
        send("try", number=number)
        try:
            return {"state": "pushed", "reason": "", **push_once(api, job)}
        except Exception as error:  # connection libraries raise their own families
            reason, again, asked_s = explain(error)
        if not again:
            return {"state": "refused", "reason": reason}
        if wait_s is not None:
            send("again", reason=reason)
            time.sleep(max(wait_s, asked_s))
    return {"state": "failed", "reason": f"{reason}, {len(waits)} times"}


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Whose token it is."""
    try:
        found = HfApi(token=job["token"]).whoami()
    except Exception as error:  # connection libraries raise their own families
        reason, _, _ = explain(error)
        status = [
            cause.response.status_code
            for cause in causes(error)
            if isinstance(cause, HfHubHTTPError) and cause.response is not None
        ]
        state = "refused" if status and status[0] in (401, 403) else "unreachable"
        return {"state": state, "reason": reason, "names": []}
    names = [found.get("name"), *(entry.get("name") for entry in found.get("orgs") or [])]
    return {"state": "known", "reason": "", "names": [name for name in names if name]}


def send(event: str, **fields: Any) -> None:
    """One event."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end is closed, by hand or by its death
    os._exit(1)


def main() -> None:
    """Do one job."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    line = sys.stdin.readline()
    if not line:
        return
    job = json.loads(line)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send("ready")
    send("done", **(push(job) if job["what"] == "push" else check(job)))
    os._exit(0)  # no library thread holds the end up


if __name__ == "__main__":
    main()
