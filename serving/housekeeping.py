"""What is deleted with time: results past their date, jobs of long ago, files that no job owns."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from serving.settings import Settings, Storage
from serving.store import JobStore
from waver_core.storage import join, local_path, remove, write_atomic

log = logging.getLogger("waver.dispatcher")
_ORPHAN_AFTER_S = 3600.0
_OWNER = ".store"


def tidy(store: JobStore, settings: Settings) -> None:
    """Fail jobs that waited too long, expire results, forget old jobs."""
    storage = settings.storage
    store.time_out_waiting(settings.queue.max_wait_s)
    gone = [job.id for job in store.expire(time.time())]
    gone += store.forget(time.time() - 86400 * storage.forget_days)
    for job_id in gone:
        try:
            remove(join(storage.folder, "jobs", job_id), recursive=True)
        except OSError:
            log.exception("the files of job %s could not be deleted", job_id)


def sweep(store: JobStore, storage: Storage) -> None:
    """Delete folders of no job or of an expired one, an hour old: left by a server that was killed between writing pictures and
    accepting the job, or between expiring or forgetting a job and deleting its files. The first store that a folder was used with
    owns it; another's is left alone.
    """
    folder = Path(local_path(join(storage.folder, "jobs")))
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / _OWNER
    if not owner.exists():
        write_atomic(str(owner), store.identity)
    if owner.read_text() != store.identity:
        log.warning("%s belongs to another job store: folders without a job are left there", folder)
        return
    for found in folder.glob("job_*"):
        if found.stat().st_mtime < time.time() - _ORPHAN_AFTER_S:
            job = store.get(found.name)
            if job is None or job.state == "expired":
                shutil.rmtree(found, ignore_errors=True)
