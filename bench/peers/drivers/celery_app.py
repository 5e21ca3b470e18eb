"""The application that Celery's worker and its caller share."""

from __future__ import annotations

import os
import time

from celery import Celery

URL = f"redis+socket://{os.environ['BENCH_REDIS_SOCKET']}"
app = Celery("bench", broker=URL, backend=URL)
app.conf.update(
    worker_prefetch_multiplier=128,
    task_serializer="json",
    result_expires=600,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=False,
    task_send_sent_event=False,
    broker_pool_limit=None,
    redis_max_connections=None,
)


@app.task
def noop() -> None:
    return None


@app.task
def nap(task_s: float) -> None:
    time.sleep(task_s)
