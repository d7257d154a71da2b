"""The whole job: same shards with and without Ray, through kills and after changes; failures are told, never hidden."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from training.data.on_the_fly import ClipSamples
from training.data.samples import build_samples
from training.data.shards import EncodedSamples, check_fingerprints
from training.encode import Resources, encode
from training.encoding import ClipEncoder
from training.encoding_units import Job, content_keys, cut
from training.recipe import Recipe
from waver_core.config import DEFAULT_PATH
from waver_core.errors import BackendUnavailable, RunFailed, UserError

ROOT = Path(__file__).resolve().parents[2]
MakeRecipe = Callable[..., Recipe]
Publish = Callable[..., str]
STAGE = "t2v_192p_12fps"


def _encode(recipe: Recipe, curated: str, output: Path, size: int = 3, **options: Any) -> tuple[dict[str, Any], str]:
    """Encode in this process; the index and what was printed."""
    console = Console(file=io.StringIO(), width=150)
    index = encode(recipe, [curated], str(output), console, Resources(serial=True), size, **options)
    return index, console.file.getvalue()  # type: ignore[attr-defined]


def _folder(output: Path, stage: str = STAGE) -> Path:
    return output / "encoded" / stage


def _contents(output: Path, stage: str = STAGE) -> dict[str, bytes]:
    """Every file of a set."""
    return {path.name: path.read_bytes() for path in _folder(output, stage).iterdir() if path.is_file()}


def _assert_same_files(a: dict[str, bytes], b: dict[str, bytes]) -> None:
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []


def _times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in _folder(output).glob("part-*")}


# ------------------------------------------------------------------ in one process


def test_a_stage_is_encoded_and_told_of(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = encoding_recipe()
    index, told = _encode(recipe, curated, tmp_path)
    assert [shard["rows"] for shard in index["shards"]] == [3, 3, 2]
    assert "8 samples for t2v_192p_12fps" in told
    assert [line.split("│")[1:6] for line in told.splitlines() if "64x64" in line] == [
        [" image ", "      1 ", "          64x64 ", "       2 ", "           16 "],
        [" video ", "      9 ", "          64x64 ", "       6 ", "           48 "],
    ]
    assert "MB in 3 shards" in told
    assert "Encoders: dct-1 scaling=root; hashed_words-1 dim=16" in told
    samples = EncodedSamples(str(_folder(tmp_path)))
    check_fingerprints(samples.index, recipe)
    table = build_samples([f"{curated}/tiers/192p"], recipe).table
    for name in table.column_names:
        assert samples.table[name].to_pylist() == table[name].to_pylist(), name
    assert {path.name for path in _folder(tmp_path).iterdir()} == {
        *("index.json", samples.index["samples"], samples.index["constants"]),
        *(shard["name"] for shard in samples.index["shards"]),
    }


@pytest.mark.parametrize("stage", ["t2v_192p_12fps", "t2v_480p", "refine_1080p"])
def test_encoding_on_the_fly_gives_the_same(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path, stage: str) -> None:
    if stage.startswith("refine"):
        pytest.importorskip("torch")
    recipe = encoding_recipe(stage)
    _encode(recipe, curated, tmp_path)
    stored = EncodedSamples(str(_folder(tmp_path, stage)))
    live = ClipSamples(build_samples([f"{curated}/tiers/{recipe.tier}"], recipe).table, recipe)
    assert len(live) == len(stored)
    assert live.table.to_pylist() == stored.table.select(live.table.column_names).to_pylist()
    assert live.constants.keys() == stored.constants.keys()
    for name, array in live.constants.items():
        np.testing.assert_array_equal(array, stored.constants[name])
    for row in range(len(live)):
        for a, b in zip(live[row], stored[row], strict=True):
            if isinstance(a, list):
                assert [[v.tolist() for v in text] for text in a] == [[v.tolist() for v in text] for text in b or []]
            else:
                np.testing.assert_array_equal(a, b)
        assert live[row] is live[row]


def test_a_second_run_encodes_nothing(
    curated: str, encoding_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = encoding_recipe()
    _encode(recipe, curated, tmp_path)
    before, times = _contents(tmp_path), _times(tmp_path)
    monkeypatch.setattr(ClipEncoder, "encode", lambda self, rows: pytest.fail("encoded again"))
    _, told = _encode(recipe, curated, tmp_path)
    assert "8 of them done before" in told
    _assert_same_files(_contents(tmp_path), before)
    assert _times(tmp_path) == times


def test_a_run_broken_off_goes_on_and_ends_the_same(
    curated: str, encoding_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = encoding_recipe()
    _encode(recipe, curated, tmp_path / "undisturbed")
    plain, calls = ClipEncoder.encode, []

    def stops(self: ClipEncoder, rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, rows)

    monkeypatch.setattr(ClipEncoder, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        _encode(recipe, curated, tmp_path / "broken")
    assert len(_times(tmp_path / "broken")) == 2
    assert not (_folder(tmp_path / "broken") / "index.json").exists()
    _encode(recipe, curated, tmp_path / "broken")
    assert calls[3:] == [2]
    _assert_same_files(_contents(tmp_path / "broken"), _contents(tmp_path / "undisturbed"))


def test_more_clips_are_added_to_what_there_is(
    clip_rows: list[dict[str, Any]], publish_clips: Publish, encoding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = encoding_recipe()
    small, large = publish_clips(tmp_path / "small", clip_rows[2:]), publish_clips(tmp_path / "large", clip_rows)
    _encode(recipe, small, tmp_path / "run")
    times = _times(tmp_path / "run")
    heavier = publish_clips(tmp_path / "heavier", [{**row, "sampling_weight": 2.0} for row in clip_rows])
    index, _ = _encode(recipe, large, tmp_path / "run")
    assert index["rows"] == 8
    assert times.items() <= _times(tmp_path / "run").items()  # and the first six were not encoded again
    times = _times(tmp_path / "run")
    _encode(recipe, heavier, tmp_path / "run")
    assert _times(tmp_path / "run") == times  # weights are not in the shards
    weights = EncodedSamples(str(_folder(tmp_path / "run"))).table["weight"].to_pylist()
    assert weights == build_samples([f"{heavier}/tiers/192p"], recipe).table["weight"].to_pylist()
    index, _ = _encode(recipe, small, tmp_path / "run")
    assert index["rows"] == 6


def test_what_changes_the_arrays_is_encoded_again(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    _encode(encoding_recipe(), curated, tmp_path)
    first = set(_times(tmp_path))
    _encode(encoding_recipe(STAGE, "training.optimizer.lr=0.1"), curated, tmp_path)
    assert set(_times(tmp_path)) == first
    _encode(encoding_recipe(STAGE, "training.encoders.autoencoder={backend: dct, options: {scaling: unit}}"), curated, tmp_path)
    second = set(_times(tmp_path))
    assert not first & second
    _encode(encoding_recipe(STAGE, "training.data.seconds=[1.25]"), curated, tmp_path)
    assert not second & set(_times(tmp_path))
    assert set(EncodedSamples(str(_folder(tmp_path))).table["frames"].to_pylist()) == {1, 5}


def test_an_object_store_holds_the_same(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = encoding_recipe()
    _encode(recipe, curated, tmp_path)
    console = Console(file=io.StringIO(), width=150)
    for _ in range(2):
        encode(recipe, [curated], f"memory:/{tmp_path}", console, Resources(serial=True), 3)
    local, remote = (EncodedSamples(folder) for folder in (str(_folder(tmp_path)), f"memory:/{_folder(tmp_path)}"))
    assert {**remote.index} == {**local.index}
    np.testing.assert_array_equal(remote[5].latents, local[5].latents)


# ------------------------------------------------------------------ what goes wrong


@pytest.fixture()
def with_broken(tmp_path: Path, clip_rows: list[dict[str, Any]], publish_clips: Publish) -> str:
    """The eight clips, of which one is no video any more."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 20)
    rows = [{**row, "source_uri": str(broken)} if k == 3 else row for k, row in enumerate(clip_rows)]
    return publish_clips(tmp_path / "curated", rows)


def test_a_broken_clip_is_listed_and_tried_again_by_the_next_run(
    with_broken: str, clip_rows: list[dict[str, Any]], encoding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = encoding_recipe()
    index, told = _encode(recipe, with_broken, tmp_path, max_failed_share=0.2)
    assert index["rows"] == 7
    assert [(f["source_uri"], f["reason"].split(":")[0]) for f in index["failed"]] == [
        (str(tmp_path / "broken.mp4"), "not_media")
    ]
    assert f"Failed: {tmp_path}/broken.mp4: not_media: cannot be opened as a video" in told
    times = _times(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(Path(clip_rows[3]["source_uri"]).read_bytes())
    index, _ = _encode(recipe, with_broken, tmp_path)
    assert index["rows"] == 8 and index["failed"] == []
    assert times.items() <= _times(tmp_path).items()
    assert len(set(EncodedSamples(str(_folder(tmp_path))).table["sample_id"].to_pylist())) == 8


def test_too_many_failures_end_the_run_and_what_is_done_stays(
    with_broken: str, encoding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(
        RunFailed, match=r"1 of \d samples could not be encoded, more than --max-failed-share .* not_media"
    ) as caught:
        _encode(encoding_recipe(), with_broken, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert not (_folder(tmp_path) / "index.json").exists()


def test_nothing_encoded_is_a_failure(
    clip_rows: list[dict[str, Any]], publish_clips: Publish, encoding_recipe: MakeRecipe, tmp_path: Path
) -> None:
    gone = publish_clips(tmp_path / "curated", [{**row, "source_uri": "/nowhere.mp4"} for row in clip_rows])
    with pytest.raises(RunFailed, match=r"not one of 8 samples could be encoded: 8 unreadable; such as /nowhere.mp4"):
        _encode(encoding_recipe(), gone, tmp_path, max_failed_share=1.0)


def test_a_missing_weight_stops_the_run(
    curated: str, encoding_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Any, clips: Any) -> Any:
        raise BackendUnavailable("fetch it first")

    monkeypatch.setattr("waver_core.backends.embedded.dct_codec.DctCodec.encode", missing)
    with pytest.raises(BackendUnavailable, match="fetch it first"):
        _encode(encoding_recipe(), curated, tmp_path)


def test_a_missing_manifest_says_what_to_do(encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest at .*/tiers/192p: run curation/run_funnel.py"):
        _encode(encoding_recipe(), str(tmp_path), tmp_path)


def test_a_clip_that_kills_its_worker_is_given_up(curated: str, encoding_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = encoding_recipe()
    samples = build_samples([f"{curated}/tiers/192p"], recipe).table
    unit = cut(samples, content_keys(samples, recipe), set(), 4)[0].to_pylist()
    job = Job(str(tmp_path), recipe, samples.schema, "run")
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, pickle, signal, sys\n"
        "from training.data import frames\n"
        "from training import encoding\n"
        "from training.encoding_units import UnitEncoder\n"
        "job, unit, poison = pickle.load(open(sys.argv[1], 'rb'))\n"
        "plain = frames.read_frames\n"
        "def read(row):\n"
        "    if row['sample_id'] == poison:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(row)\n"
        "encoding.read_frames = read\n"
        "print(UnitEncoder(job)(unit)[0]['failed'])\n"
    )
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((job, unit, unit[1]["sample_id"])))
    command = [sys.executable, str(script), str(tmp_path / "job.pickle")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):  # once among others, then twice alone
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert [(f["sample_id"], f["reason"]) for f in json.loads(told)] == [
        (unit[1]["sample_id"], "RuntimeError: the worker died 2 times while it was encoded")
    ]
    part = next(tmp_path.glob("part-*.parquet"))
    assert pq.read_table(part)["sample_id"].to_pylist() == [row["sample_id"] for row in unit if row != unit[1]]
    assert not list((tmp_path / "attempts").rglob("*.json"))


def test_a_broken_clip_on_the_fly_raises_what_is_wrong(with_broken: str, encoding_recipe: MakeRecipe) -> None:
    recipe = encoding_recipe()
    samples = ClipSamples(build_samples([f"{with_broken}/tiers/192p"], recipe).table, recipe)
    row = samples.table["source_uri"].to_pylist().index(next(u for u in samples.table["source_uri"].to_pylist() if "broken" in u))
    with pytest.raises(UserError, match=r"broken.* cannot be encoded .*encode first"):
        samples[row]


def test_units_keep_within_bytes_and_cover_every_sample(
    curated: str, encoding_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = encoding_recipe()
    samples = build_samples([f"{curated}/tiers/192p"], recipe).table
    keys = content_keys(samples, recipe)
    assert len(set(keys)) == len(keys) == 8
    monkeypatch.setattr("training.encoding_units._UNIT_BYTES", 2 * 16 * 3 * 8 * 8 * 2)
    units = cut(samples, keys, set(), 64)
    assert [key for unit in units for key in unit["content_key"].to_pylist()] == keys
    assert all(sum(unit["frames"].to_pylist()) <= 20 for unit in units)
    done = {keys[0], *keys[4:6]}
    rest = [key for unit in cut(samples, keys, done, 2) for key in unit["content_key"].to_pylist()]
    assert sorted(rest) == sorted(set(keys) - done)


# ------------------------------------------------------------------ as a script, on Ray


@pytest.fixture(scope="module")
def settings(encoding_sets: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The overrides, and the configuration as it is now: runs that are compared must not see it change."""
    path = tmp_path_factory.mktemp("config") / "pipelines.yaml"
    path.write_text(DEFAULT_PATH.read_text())
    return (str(path), *encoding_sets)


def _command(curated: str, output: Path, settings: tuple[str, ...], *more: str) -> list[str]:
    config, *sets = settings
    given = ["--config", config] + [part for override in sets for part in ("--set", override)]
    script = str(ROOT / "training" / "encode.py")
    return [sys.executable, script, "--stage", STAGE, "--curated", curated, "--output", str(output), *given, *more]


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str], code: int = 0) -> str:
    told, _ = process.communicate(timeout=100)
    assert process.returncode == code, told
    return told


def _wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("the run never reached the state that the test waits for")


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Actors of the run."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture(scope="module")
def undisturbed(curated: str, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run without Ray makes, one sample to a shard."""
    output = tmp_path_factory.mktemp("undisturbed")
    _finish(_start(_command(curated, output, settings, "--serial", "--samples-per-shard", "1")))
    return _contents(output)


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, settings: tuple[str, ...]) -> None:
    told = _finish(_start(_command(str(tmp_path / "none"), tmp_path, settings)), code=2)
    assert told.startswith("error: no manifest at") and told.count("\n") == 1
    told = _finish(_start([*_command("x", tmp_path, settings)[:3], "t2v_720", "--curated", "x", "--output", "y"]), code=2)
    assert told.startswith("error: no training stage 't2v_720': did you mean 't2v_720p'") and told.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_killed_in_its_work_costs_nothing(
    curated: str, settings: tuple[str, ...], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    process = _start(_command(curated, tmp_path, settings, "--samples-per-shard", "1", "--actors", "1"))
    worker = _wait_for(lambda: _workers(process))[0]
    _wait_for(lambda: list(_folder(tmp_path).glob("part-*")))
    worker.kill()
    assert len(_times(tmp_path)) < 8
    _finish(process)
    _assert_same_files(_contents(tmp_path), undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_killed_in_the_middle_goes_on_where_it_stopped(
    curated: str, settings: tuple[str, ...], tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    command = _command(curated, tmp_path, settings, "--samples-per-shard", "1", "--actors", "1")
    process = _start(command)
    _wait_for(lambda: list(_folder(tmp_path).glob("part-*")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=20)
    times = _times(tmp_path)
    assert times and not (_folder(tmp_path) / "index.json").exists()
    _finish(_start(command))
    assert times.items() <= _times(tmp_path).items()
    _assert_same_files(_contents(tmp_path), undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_of_a_worker_is_one_line(curated: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    more = (*settings, "training.encoders.autoencoder={backend: wan_vae, options: {checkpoint: /nowhere}}")
    told = _finish(_start(_command(curated, tmp_path, more, "--actors", "1")), code=2)
    assert [line for line in told.splitlines() if line.startswith("error: ")], told
    assert "/nowhere" in told and "Traceback" not in told
