"""What becomes of jobs with time: silent workers, waiting too long, results past their date, rows of long ago.

Each call takes at most `BATCH` jobs in one transaction, so that a store with a long backlog is not locked for seconds; the rest
is for the next call.
"""

from __future__ import annotations

from sqlalchemy import delete, select, update

from serving.database import Database
from serving.jobs import Job
from serving.places import leave
from serving.tables import EVENTS, EXPIRING, JOBS, PENDING, QUEUED, RUNNING
from serving.transitions import AGAIN, change, end, locked, locked_where, well_formed

BATCH = 500


class Upkeep(Database):
    """The part of the store that the dispatcher's housekeeping uses. All of it may run on several machines at once."""

    def reclaim(self, lease_s: float, max_attempts: int) -> list[Job]:
        """Take jobs from workers that have been silent for `lease_s`: queued again, or ended.

        Cancelled where that was asked; failed as `worker_lost` after `max_attempts`. Returns the jobs as they are now.
        """
        now = self.clock()
        changed = []
        with self.write() as connection:
            silent = JOBS.c.heartbeat_at < now - lease_s
            for job in locked_where(connection, RUNNING, silent, order=JOBS.c.heartbeat_at, limit=BATCH):
                if job.cancel_requested:
                    changed.append(end(connection, job, "cancelled", now))
                elif job.attempt >= max_attempts:
                    message = f"The worker was lost {job.attempt} times in the midst of this job; see the server's log."
                    changed.append(end(connection, job, "failed", now, error_code="worker_lost", error_message=message))
                else:
                    changed.append(change(connection, job, queued_at=now, **AGAIN))
        return changed

    def time_out_waiting(self, max_wait_s: float) -> list[Job]:
        """Fail as `queue_timeout` what has waited for longer since it last came into the queue; returns those jobs."""
        now = self.clock()
        message = f"It waited for more than {max_wait_s:g} s; ask again when fewer jobs wait."
        with self.write() as connection:
            late = locked_where(connection, QUEUED, JOBS.c.queued_at < now - max_wait_s, order=JOBS.c.queued_at, limit=BATCH)
            return [end(connection, job, "failed", now, error_code="queue_timeout", error_message=message) for job in late]

    def expire(self, now: float) -> list[Job]:
        """Turn completed jobs past `expires_at` into expired ones without files.

        Returns them with the paths they had, for the caller to delete. The row goes first: no job names a file that is gone.
        """
        with self.write() as connection:
            past = locked_where(connection, EXPIRING, JOBS.c.expires_at <= now, order=JOBS.c.expires_at, limit=BATCH)
            for job in past:
                change(connection, job, state="expired", output=None, preview=None)
        return past

    def delete(self, job_id: str) -> bool:
        """Forget one job that has ended; False where there is none or it has not. Its webhook, if still owed, is given up."""
        if not well_formed(job_id):
            return False
        with self.write() as connection:
            job = locked(connection, job_id)
            if job is None or not job.ended:
                return False
            connection.execute(
                update(EVENTS).where(EVENTS.c.job_id == job_id, PENDING).values(state="failed", note="the job was deleted first")
            )
            connection.execute(delete(JOBS).where(JOBS.c.id == job_id))
            leave(connection, job, self.clock())
        return True

    def forget(self, before: float) -> list[str]:
        """Delete the rows of jobs that ended before this time, and events as old; returns the jobs' ids, for their folders."""
        old = JOBS.c.finished_at < before  # only what has ended has such a time
        with self.write() as connection:
            query = select(JOBS.c.id).where(old).order_by(JOBS.c.finished_at).limit(BATCH).with_for_update(skip_locked=True)
            ids = list(connection.scalars(query))
            connection.execute(delete(JOBS).where(JOBS.c.id.in_(ids)))
            connection.execute(delete(EVENTS).where(EVENTS.c.created_at < before))
        return ids
