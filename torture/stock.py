"""A node of stock PySyncObj 0.3.17 behind the same API as an agent, so that the same clients can torture it.

It holds a dict of jobs, with the journal file and the dump on and log compaction at work. A
submission is acknowledged when PySyncObj's callback says SUCCESS, that is when the leader
counted it on a majority and this node applied it; nothing is fsynced, stock never does. A
read goes through its log, because stock has no other that would be linearizable. Runs as a
process of its own and imports nothing of meshd.raft, which changes PySyncObj's module globals.

    python -m torture.stock DIRECTORY ME OTHER …          addresses as HOST:PORT
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

ANSWER_S = 10.0
RETRY_S = 0.5
"""Stock's own 5 s between two dials of a lost peer would make every cycle as long."""
COMPACTION_ENTRIES, COMPACTION_S = 200, 5
"""Stock's own 5,000 and 300 s would hardly come up in a short run."""


class Unknown(Exception):
    """The callback said something else than SUCCESS, or nothing."""


class Jobs(SyncObj):  # type: ignore[misc]
    def __init__(self, me: str, others: list[str], conf: SyncObjConf) -> None:
        super().__init__(me, others, conf)
        self.jobs: dict[str, str] = {}

    @replicated  # type: ignore[untyped-decorator]
    def put(self, job: str, spec: str) -> bool:
        """Whether it is new."""
        is_new = job not in self.jobs
        self.jobs.setdefault(job, spec)
        return is_new

    @replicated  # type: ignore[untyped-decorator]
    def has(self, job: str) -> bool:
        return job in self.jobs

    def ask(self, method: Any, *arguments: str) -> bool:
        """Its result, once it is applied here. Raises Unknown."""
        done = threading.Event()
        found: list[tuple[bool, int]] = []

        def answered(result: bool, error: int) -> None:
            found.append((result, error))
            done.set()

        method(*arguments, callback=answered)
        if not done.wait(ANSWER_S):
            raise Unknown(f"no callback within {ANSWER_S:.0f} s")
        result, error = found[0]
        if error != FAIL_REASON.SUCCESS:
            raise Unknown(f"the callback says {error}")
        return result


class Server(ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, path: Path, jobs: Jobs) -> None:
        path.unlink(missing_ok=True)
        super().__init__(str(path), Handler)
        self.jobs = jobs

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        jobs = self.server.jobs
        try:
            is_new = jobs.ask(jobs.put, body["id"], json.dumps(body["spec"]))
        except Unknown as error:
            self._answer(503, {"error": str(error)})
        else:
            self._answer(200, {"id": body["id"], "is_new": is_new})

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        jobs = self.server.jobs
        if asked.path == "/v1/cluster":
            self._answer(200, _status(jobs))
        elif asked.path == "/v1/jobs":
            query = parse_qs(asked.query)
            is_unfinished_asked = "state" in query
            ids = (
                []
                if is_unfinished_asked
                else [job for job, spec in list(jobs.jobs.items()) if json.loads(spec)["name"] == query["name"][0]]
            )
            self._answer(200, {"jobs": [{"id": job, "state": "done", "is_final": True} for job in ids], "next": None})
        else:
            job = asked.path.split("/")[3]
            try:
                is_there = jobs.ask(jobs.has, job)
            except Unknown as error:
                self._answer(503, {"error": str(error)})
            else:
                row = {"task": 0, "state": "done", "attempt": 1, "fence": 1}
                self._answer(200 if is_there else 404, row)

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """One line a request is too much."""


def _status(jobs: Jobs) -> dict[str, Any]:
    status = jobs.getStatus()
    leader = status["leader"]
    return {
        "leader": None if leader is None else leader.id,
        "term": status["raft_term"],
        "applied": status["last_applied"],
        "is_ready": jobs.isReady(),
    }


def main(directory: Path, me: str, others: list[str]) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    directory.mkdir(exist_ok=True)
    conf = SyncObjConf(
        journalFile=str(directory / "journal"),
        fullDumpFile=str(directory / "dump"),
        logCompactionMinEntries=COMPACTION_ENTRIES,
        logCompactionMinTime=COMPACTION_S,
        connectionRetryTime=RETRY_S,
    )
    jobs = Jobs(me, others, conf)
    server = Server(directory / "api.sock", jobs)
    print("\nready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
