"""A silent worker ends itself and says where it stood; a slow one is named."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from training.group import Worker
from training.watch import HUNG, Stragglers, Watchdog, probe_device

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 0.2


class _End:
    """In place of `os._exit`."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.called = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


def test_silence_ends_the_worker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    end, told = _End(), list[str]()
    with Watchdog(LIMIT_S, told.append, worker=Worker(2, 4), folder=tmp_path / "hangs", end=end) as watchdog:
        watchdog.beat("step 7: micro-batch 3")
        assert end.called.wait(10)
    assert end.codes == [HUNG]
    (line,) = told
    assert line.startswith("worker 2 of 4 on ") and " s after step 7: micro-batch 3; it ends" in line
    assert "training.workers.hang_after_s" in line and "\n" not in line
    (file,) = (tmp_path / "hangs").iterdir()
    assert file.name.endswith("-worker-2.txt")
    for text in (file.read_text(), capfd.readouterr().err):  # the line, and where the silent thread stood
        assert line in text and "test_silence_ends_the_worker" in text


def test_beats_keep_it_alive_and_a_pause_has_no_limit() -> None:
    end = _End()
    with Watchdog(LIMIT_S, lambda line: None, end=end) as watchdog:
        for number in range(10):
            time.sleep(LIMIT_S / 4)
            watchdog.beat(f"step {number}")
        with watchdog.paused("checkpoint"):
            time.sleep(3 * LIMIT_S)
        time.sleep(LIMIT_S / 4)
        assert end.codes == []
        assert end.called.wait(10), "the limit counts again after a pause"


def test_a_closed_watchdog_and_one_without_a_limit_end_nothing() -> None:
    end = _End()
    threads = threading.active_count()
    never = Watchdog(None, lambda line: None, end=end)
    assert threading.active_count() == threads
    closed = Watchdog(LIMIT_S, lambda line: None, end=end)
    closed.close()
    time.sleep(2 * LIMIT_S)
    never.close()
    assert end.codes == []


def test_a_worker_that_was_stopped_was_not_silent() -> None:
    """Between two looks an hour goes by in which the process did not run: that is no reason to end it."""
    end, now = _End(), [0.0]
    with Watchdog(1.0, lambda line: None, end=end, clock=lambda: now[0]):  # looks every 0.1 s
        now[0] += 3600
        assert not end.called.wait(0.3)
        while not end.called.wait(0.05):
            now[0] += 0.1
    assert now[0] > 3600.5


@pytest.mark.parametrize("trouble", ["raises", "hangs"])
def test_what_it_says_cannot_keep_it_from_ending(
    trouble: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.watch._FAREWELL_S", 0.1)

    def tell(line: str) -> None:
        if trouble == "raises":
            raise RuntimeError("no network")
        time.sleep(30)

    end = _End()
    with Watchdog(LIMIT_S, tell, end=end):
        assert end.called.wait(10)
    assert "after its start" in capfd.readouterr().err


_CHILD = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from training.watch import Watchdog
def waits_for_the_others():
    threading.Lock().acquire() and threading.Event().wait()
watchdog = Watchdog(0.3, lambda line: print(line, flush=True))
watchdog.beat("step 4: gradients")
try:
    waits_for_the_others()
finally:
    print("unwound")
"""


def test_a_process_that_hangs_dies_with_its_status() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD, str(ROOT)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == HUNG
    assert "after step 4: gradients; it ends" in done.stdout and "unwound" not in done.stdout
    assert "waits_for_the_others" in done.stderr


def _reports(own: list[list[list[float]]], rank: int) -> tuple[list[dict[str, float]], list[str]]:
    """What worker `rank` reports and tells when all workers' means are `own`, by report, rank and part."""
    told: list[str] = []
    rounds = iter(own)
    worker = Worker(rank, len(own[0]))
    stragglers = Stragglers(worker, told.append, probe=lambda device: 0.02, gather=lambda values, worker: next(rounds))
    return [stragglers.report() for _ in own], told


EVEN = [[0.0, 0.020], [0.0, 0.021], [0.0, 0.020], [0.0, 0.022]]
SLOW_DEVICE = [[0.0, 0.020], [0.0, 0.021], [0.0, 0.050], [0.0, 0.020]]
SLOW_DATA = [[0.001, 0.020], [3.0, 0.020], [0.002, 0.020], [0.0, 0.020]]


def test_a_slow_worker_is_named_once_it_stays_slow() -> None:
    reports, told = _reports([EVEN, SLOW_DEVICE, EVEN, *[SLOW_DEVICE] * 5], rank=2)
    assert reports[0] == {"slowest_worker": 3, "slowest_ratio": pytest.approx(0.022 / 0.0205)}
    assert reports[1] == {"slowest_worker": 2, "slowest_ratio": pytest.approx(0.050 / 0.0205)}
    (line,) = told
    assert line.startswith("worker 2 of 4 on ")
    assert "a fixed piece of work on its device takes 2.4 times the median of all workers, 3 reports in succession" in line


def test_the_others_do_not_speak_for_it() -> None:
    assert _reports([SLOW_DEVICE] * 5, rank=1)[1] == []


def test_waits_for_data_count_from_a_tenth_of_a_second() -> None:
    reports, (line,) = _reports([SLOW_DATA] * 3, rank=1)
    assert reports[0] == {"slowest_worker": 1, "slowest_ratio": pytest.approx(30.0)}
    assert "its wait for data" in line
    short = [[0.0, 0.02], [0.05, 0.02], [0.0, 0.02], [0.0, 0.02]]
    assert _reports([short] * 5, rank=1)[1] == []


def test_means_since_the_last_report_are_gathered() -> None:
    seen: list[list[float]] = []

    def gather(values: list[float], worker: Worker) -> list[list[float]]:
        seen.append(values)
        return [values] * worker.world

    stragglers = Stragglers(Worker(0, 2), lambda line: None, probe=lambda device: 0.25, gather=gather)
    for seconds in (1.0, 2.0):
        stragglers.add("data", seconds)
    stragglers.report()
    stragglers.report()
    assert seen == [[1.5, 0.25], [0.0, 0.25]]


def test_one_worker_has_nobody_to_compare_with() -> None:
    def refuse(values: list[float], worker: Worker) -> list[list[float]]:
        raise AssertionError("nothing is to be gathered")

    stragglers = Stragglers(Worker(), lambda line: None, gather=refuse)
    stragglers.add("data", 1.0)
    assert stragglers.report() == {}


def test_the_probe_takes_time_on_the_device() -> None:
    assert 0 < probe_device("cpu") < 5


_WORKER = """
import sys, json
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
torch.set_num_threads(1)
from training.group import Worker
from training.watch import Stragglers
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
told = []
stragglers = Stragglers(Worker(rank, 2), told.append, probe=lambda device: 0.1 + rank, patience=2)
reports = [stragglers.report() for _ in range(3)]
print(json.dumps([reports, told]))
dist.destroy_process_group()
"""


def test_two_processes_agree_on_the_slow_one(tmp_path: Path, run_all: Callable[[list[list[str]]], list[str]]) -> None:
    command = [sys.executable, "-c", _WORKER, str(ROOT)]
    first, second = (json.loads(text) for text in run_all([[*command, str(rank), str(tmp_path / "meet")] for rank in (0, 1)]))
    assert first[0] == second[0] == [{"slowest_worker": 1, "slowest_ratio": pytest.approx(1.1 / 0.6)}] * 3
    assert first[1] == [] and len(second[1]) == 1 and "2 reports in succession" in second[1][0]


@pytest.fixture
def run_all() -> Callable[[list[list[str]]], list[str]]:
    """Run commands side by side; returns what each printed."""

    def run(commands: list[list[str]]) -> list[str]:
        processes = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
        printed = [p.communicate(timeout=60)[0] for p in processes]
        assert [p.returncode for p in processes] == [0] * len(commands)
        return printed

    return run
