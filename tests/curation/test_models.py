"""Models before a run: what is listed, what is fetched (from a server and a hub of the test's own), and what answers."""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from curation import backend_check, models
from curation.stage import ClipMedia, FrameRequest, Row, Stage, load_stages
from waver_core import command_line, fetching
from waver_core.checkpoints import FETCHED_NAME, Checkpoint
from waver_core.config import load_config
from waver_core.errors import BackendUnavailable, ConfigError, UserError
from waver_core.manifest import Column, build_schema

Call = Callable[..., tuple[int, str, str]]
DINOV2 = "funnel.stages.segment.scene_backend=dinov2"
RAFT = "funnel.stages.motion.flow_backend=raft"


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models, and no token: nothing on this machine leaks in."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENWAVER_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every package were installed, so that the outcome does not depend on this environment."""
    monkeypatch.setattr(backend_check, "_installed", lambda package: True)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the entry script's main in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["models.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command_line.run(models.app)
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def few_stages(tmp_path: Path) -> Path:
    """A configuration of a funnel of a few stages without tiers."""
    path = tmp_path / "few.yaml"
    order = "[ingest, segment, technical, aesthetic, motion, publish]"
    stages = "{segment: {}, aesthetic: {}, motion: {}}"
    path.write_text(f"version: 1\nfunnel:\n  order: {order}\n  stages: {stages}\ntiers: {{}}\n")
    return path


def cells(out: str) -> list[list[str]]:
    """The rows of the printed table."""
    return [[c.strip() for c in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- list and check -----------------------------------------------------------------------------------------------------


def test_the_embedded_profile_needs_nothing(call: Call) -> None:
    code, out, err = call("list", "--profile", "embedded")
    config = load_config(None, ["embedded"])
    uses = [[s.name, u.capability, u.name] for s in load_stages(config).stages for u in s.backends()]
    assert (code, err) == (0, "")
    assert [row[:4] for row in cells(out)] == [[*use, "none"] for use in uses]
    assert "0 checkpoints, 0 to fetch (0 MB)" in out


def test_every_backend_of_the_embedded_profile_answers(call: Call) -> None:
    code, out, err = call("check", "--profile", "embedded")
    rows = cells(out)
    assert (code, err) == (0, "")
    assert len(rows) >= 7 and [row for row in rows if not row[-1].startswith("ok: ")] == []
    assert {row[0] for row in rows} >= {"segment", "aesthetic", "overlay", "motion", "label"}
    assert all(float(row[3]) >= 0 and float(row[4].replace(",", "")) > 50 for row in rows)
    assert f"{len(rows)} backends can run" in out


def test_what_is_missing_is_listed_with_its_size_and_remedy(call: Call, all_installed: None, models_folder: Path) -> None:
    code, out, err = call("list", "--set", DINOV2, "--set", RAFT)
    rows = {row[2]: row[3:] for row in cells(out)}
    assert (code, err) == (0, "")
    assert rows["dinov2"] == ["facebook/dinov2-small", "main", "88", "Apache-2.0", "no", "missing", ""]
    assert rows["raft"][0] == "torchvision/raft_small" and rows["raft"][5] == "missing"
    flat = " ".join(out.split())
    assert f"2 checkpoints, 2 to fetch (92 MB). Models folder: {models_folder}" in flat
    assert f"`python curation/models.py fetch --set {DINOV2} --set {RAFT}` brings 2 checkpoints (92 MB)" in flat


def test_a_check_tells_of_all_that_is_missing_and_still_asks_the_others(
    call: Call, monkeypatch: pytest.MonkeyPatch, few_stages: Path
) -> None:
    monkeypatch.setattr(backend_check, "_installed", lambda package: package != "torchvision")
    aesthetic = "funnel.stages.aesthetic.backend=no_such_scorer"
    code, out, err = call("check", "--config", few_stages, "--set", DINOV2, "--set", RAFT, "--set", aesthetic)
    results: dict[str, list[str]] = {}
    backend = ""
    for row in cells(out):
        backend = row[2] or backend  # lines of one cell go on below one another
        results.setdefault(backend, []).append(row[-1])
    assert code == 1 and one_line(err)
    packages = "packages missing: torchvision (extra 'models')"
    assert results["dinov2"] == [packages, "checkpoint missing: facebook/dinov2-small"]
    assert results["raft"] == [packages, "checkpoint missing: torchvision/raft_small"]
    assert results["no_such_scorer"][0].startswith("no backend 'no_such_scorer' for aesthetic_scorer")
    assert results["color_layout"][0].startswith("ok: ") and results["residual"][0].startswith("ok: ")
    for part in (
        "3 of 5 backends cannot run: ",
        "`make setup-models`, or pip install -e '.[models]', installs torchvision",
        "brings 2 checkpoints (92 MB)",
        "of aesthetic/no_such_scorer the table says why",
    ):
        assert part in err


def dies(*arguments: Any) -> None:
    os._exit(7)


def hangs(*arguments: Any) -> None:
    time.sleep(60)


@pytest.mark.parametrize(("what", "timeout", "expected"), [(dies, 30, "died with code 7"), (hangs, 0.1, "no answer within")])
def test_a_backend_that_takes_its_process_down_hides_no_other(
    what: Callable[..., None], timeout: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # threads instead of processes would die with the test; a fork needs no import of this file
    context = backend_check.multiprocessing.get_context("fork")
    monkeypatch.setattr(backend_check.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(backend_check, "_answer_all", what)
    config = load_config()
    needs = backend_check.needs_of(config, load_stages(config))[:2]
    verdicts = backend_check.check(config, needs, timeout, lambda verdict: None)
    assert [v.need for v in verdicts] == needs
    assert all(len(v.problems) == 1 and expected in v.problems[0] for v in verdicts)


def test_a_backend_that_only_vllm_serves_is_not_asked(all_installed: None, models_folder: Path) -> None:
    options = "funnel.stages.label.backend_options={engine: vllm, checkpoint: Qwen/Qwen2.5-0.5B-Instruct}"
    config = load_config(None, [], ["funnel.stages.label.backend=qwen2_5", options])
    [need] = [n for n in backend_check.needs_of(config, load_stages(config)) if n.stage == "label"]
    assert need.problems == ["checkpoint missing: Qwen/Qwen2.5-0.5B-Instruct"]
    weights = models_folder / "Qwen/Qwen2.5-0.5B-Instruct" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"not looked into")
    [verdict] = backend_check.check(config, [need], 1, lambda verdict: None)
    assert verdict.problems == [] and "vLLM" in verdict.answer


class Still(Stage):
    """A stage whose answer the test chooses."""

    name = "still"
    hooks = ("clip",)
    columns = (Column("still_score", pa.float64(), "a number", score=True), Column("still_text", pa.string(), "a text"))

    def requests(self) -> tuple[FrameRequest, ...]:
        return (FrameRequest(32, count=2),)

    def score(self, media: ClipMedia) -> Row:
        assert media.frames[self.requests()[0]].rgb.shape[:2] == (2, 32) and media.row["kind"] == "video"
        answer: Row | Exception = self.options
        if isinstance(answer, Exception):
            raise answer
        return answer


ANSWERS: list[tuple[Row | Exception, type[Exception], str]] = [
    ({}, ValueError, "gave no value for any column"),
    ({"still_score": float("nan")}, ValueError, "numbers that are none for still_score"),
    ({"still_score": "much"}, pa.ArrowInvalid, "much"),
    ({"stil_score": 1.0}, UserError, "columns that no stage declares: stil_score"),
    (MemoryError("too large"), MemoryError, "too large"),
]


@pytest.mark.parametrize(("answer", "kind", "message"), ANSWERS)
def test_an_answer_that_is_none_counts_as_a_problem(
    counted_mp4: str, answer: Row | Exception, kind: type[Exception], message: str
) -> None:
    schema = build_schema({"still": Still.columns})
    assert backend_check.ask(Still({"still_text": "yes"}), counted_mp4, schema) == {"still_text": "yes"}
    with pytest.raises(kind, match=message):
        backend_check.ask(Still(answer), counted_mp4, schema)


def test_a_backend_is_asked_without_the_others_of_its_stage() -> None:
    others = ["funnel.stages.overlay.watermark_backend=classifier", "funnel.stages.overlay.text_backend=paddleocr"]
    stages = load_stages(load_config(None, [], [*others, DINOV2, RAFT]))
    watermark, text = stages.named("overlay").backends()
    assert [u.name for u in backend_check.alone(stages.named("overlay"), watermark).backends()] == ["classifier"]
    assert [u.name for u in backend_check.alone(stages.named("overlay"), text).backends()] == ["static_overlay", "paddleocr"]
    every, scene = stages.named("segment").backends()
    assert backend_check.alone(stages.named("segment"), every).backends() == [every]
    assert backend_check.alone(stages.named("segment"), scene).backends() == [every, scene]
    flow, foreground = stages.named("motion").backends()
    assert [u.name for u in backend_check.alone(stages.named("motion"), foreground).backends()] == ["dis", "residual"]
    assert [u.name for u in backend_check.alone(stages.named("motion"), flow).backends()] == ["raft", "residual"]


@pytest.mark.models
def test_one_model_answers_while_another_is_missing(call: Call, models_folder: Path, few_stages: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = models_folder / "facebook" / "dinov2-small"
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    BitImageProcessor(
        do_center_crop=True,
        do_convert_rgb=True,
        resample=3,
        size={"shortest_edge": 128},
        crop_size={"height": 112, "width": 112},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    code, out, err = call("check", "--config", few_stages, "--set", DINOV2, "--set", RAFT)
    rows = {row[2]: row for row in cells(out)}
    assert code == 1 and one_line(err)
    assert rows["dinov2"][-1].startswith("ok: segment_similarity = ") and float(rows["dinov2"][3]) > 0
    assert rows["raft"][-1] == "checkpoint missing: torchvision/raft_small"
    assert rows["residual"][-1].startswith("ok: ")
    assert "1 of 5 backends cannot run" in err and "brings 1 checkpoint (4 MB)" in err


# --- files at a URL -----------------------------------------------------------------------------------------------------

WEIGHTS = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves WEIGHTS whole or from an offset; `/short` breaks off half-way."""

    asked: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.path.startswith("/none"):
            self.send_error(404)
        elif start >= len(WEIGHTS):
            self.send_error(416)
        else:
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(WEIGHTS) - start))
            self.end_headers()
            self.wfile.write(WEIGHTS[start : len(WEIGHTS) // 2 if self.path.startswith("/short") else None])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """A web server on this machine; its address."""
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def at(server: str, path: str = "head.pth", sha256: str | None = SHA256) -> Checkpoint:
    return Checkpoint("someone/head", size_mb=1, licence="MIT", url=f"{server}/{path}", sha256=sha256)


def test_a_file_is_fetched_once_and_its_digest_written_down(server: str, models_folder: Path) -> None:
    checkpoint = at(server)
    with pytest.raises(BackendUnavailable, match=r"run `python curation/models\.py fetch --checkpoint someone/head`"):
        checkpoint.locate()
    assert fetching.fetch(checkpoint) is True
    assert checkpoint.locate().read_bytes() == WEIGHTS
    record = json.loads((models_folder / "someone/head" / FETCHED_NAME).read_text())
    assert record["files"] == {"head.pth": {"sha256": SHA256, "bytes": len(WEIGHTS)}}
    assert record["url"] == checkpoint.url and checkpoint.exact_revision == f"sha256-{SHA256[:16]}"
    assert fetching.fetch(checkpoint) is False and len(Server.asked) == 1


@pytest.mark.parametrize(("path", "sha256"), [("head.pth", "0" * 64), ("head-0123abcd.pth", None)])
def test_a_wrong_digest_leaves_nothing_behind(server: str, models_folder: Path, path: str, sha256: str | None) -> None:
    with pytest.raises(fetching.FetchFailed, match=f"has the sha256 {SHA256}, not .*: nothing was kept"):
        fetching.fetch(at(server, path, sha256))
    assert files_in(models_folder) == [] and not (models_folder / "someone/head").exists()


def test_a_digest_in_the_name_is_checked(server: str, models_folder: Path) -> None:
    fetching.fetch(at(server, f"head-{SHA256[:8]}.pth", None))
    assert files_in(models_folder / "someone/head") == [f"head-{SHA256[:8]}.pth", FETCHED_NAME]


def test_a_broken_off_download_goes_on_where_it_stopped(server: str, models_folder: Path) -> None:
    with pytest.raises(fetching.FetchFailed, match="broke off"):
        fetching.fetch(at(server, "short/head.pth"))
    assert files_in(models_folder) == ["someone/head/head.pth.incomplete"]
    assert fetching.state_of(at(server)) == "incomplete"
    assert fetching.fetch(at(server)) and Server.asked[-1] == ("/head.pth", f"bytes={len(WEIGHTS) // 2}-")
    assert at(server).locate().read_bytes() == WEIGHTS
    whole = models_folder / "someone/head" / "head.pth"
    whole.rename(whole.with_name("head.pth.incomplete"))  # killed between the last byte and the rename
    assert fetching.fetch(at(server)) and whole.read_bytes() == WEIGHTS


def test_without_a_digest_a_broken_off_download_starts_anew(server: str) -> None:
    with pytest.raises(fetching.FetchFailed, match="broke off"):
        fetching.fetch(at(server, "short/head.pth", None))
    assert fetching.fetch(at(server, sha256=None)) and Server.asked[-1] == ("/head.pth", None)


def test_a_fetch_by_name_knows_the_url_and_says_what_went_wrong(
    call: Call, server: str, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raft = importlib.import_module("waver_core.backends.pretrained.raft")
    monkeypatch.setitem(raft.CHECKPOINTS, "small", Checkpoint("torchvision/raft_small", url=f"{server}/raft.pth", sha256=SHA256))
    code, out, err = call("fetch", "--checkpoint", "torchvision/raft_small")
    assert (code, err) == (0, "") and f"1 checkpoint in {models_folder}, 1 of them fetched now" in out
    code, out, err = call("fetch", "--set", RAFT)
    assert (code, err) == (0, "") and "0 of them fetched now" in out
    monkeypatch.setitem(raft.CHECKPOINTS, "small", Checkpoint("torchvision/other", url=f"{server}/none.pth"))
    code, out, err = call("fetch", "--set", RAFT)
    assert code == 2 and one_line(err) and "answers 404" in err
    assert f"run `python curation/models.py fetch --set {RAFT}` on a machine that has one" in err


def test_too_small_a_disk_is_noticed_first(call: Call, monkeypatch: pytest.MonkeyPatch, models_folder: Path) -> None:
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    code, out, err = call("fetch", "--set", DINOV2)
    assert code == 2 and one_line(err) and out == ""
    assert "0.1 GB are to be fetched" in err and "OPENWAVER_MODELS" in err
    assert not models_folder.exists()


# --- repositories of the hub ----------------------------------------------------------------------------------------------


class HubError(OSError):
    pass


class RepositoryNotFoundError(HubError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HubError):
    pass


class Hub:
    """The part of huggingface_hub that is used: one repository with a commit per revision."""

    def __init__(self) -> None:
        self.files = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"not wanted"}
        self.commits = {"main": "c" * 40, "v2": "d" * 40}
        self.gated: str | bool = False
        self.token: str | None = None
        self.failure: Exception | None = None
        self.damage = b""
        self.downloads: list[str] = []
        self.errors = SimpleNamespace(
            GatedRepoError=GatedRepoError,
            RepositoryNotFoundError=RepositoryNotFoundError,
            RevisionNotFoundError=RevisionNotFoundError,
        )
        self.utils = SimpleNamespace(
            filter_repo_objects=lambda names, allow_patterns: [n for n in names if any(Path(n).match(p) for p in allow_patterns)]
        )

    def HfApi(self) -> Hub:
        return self

    def get_token(self) -> str | None:
        return self.token

    def repo_info(self, repo: str, revision: str, files_metadata: bool) -> Any:
        assert files_metadata
        if revision not in self.commits:
            raise RevisionNotFoundError("404")
        digests = {n: SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) for n, data in self.files.items()}
        siblings = [
            SimpleNamespace(rfilename=n, size=len(data), lfs=digests[n] if n.endswith(".safetensors") else None)
            for n, data in self.files.items()
        ]
        return SimpleNamespace(sha=self.commits[revision], siblings=siblings, gated=self.gated)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str], local_dir: Path) -> str:
        self.downloads.append(revision)
        for name in self.utils.filter_repo_objects(self.files, allow_patterns):
            (local_dir / name).write_bytes(self.files[name] + self.damage)
            if self.failure:
                raise self.failure
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)  # type: ignore[arg-type]
    return fake


REPO = Checkpoint("someone/model", size_mb=1, licence="MIT")


def test_a_repository_is_fetched_at_one_commit_and_only_what_is_wanted(call: Call, hub: Hub, models_folder: Path) -> None:
    code, out, err = call("fetch", "--checkpoint", "someone/model")
    assert (code, err) == (0, "") and "commit cccccccccccc" in out
    folder = models_folder / "someone/model"
    assert files_in(folder) == ["config.json", "model.safetensors", FETCHED_NAME]
    record = json.loads((folder / FETCHED_NAME).read_text())
    assert record["revision"] == "c" * 40 and record["asked"] == "main"
    assert record["files"]["model.safetensors"] == {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
    assert REPO.exact_revision == "c" * 40 and REPO.locate() == folder
    assert call("fetch", "--checkpoint", "someone/model")[0] == 0 and hub.downloads == ["c" * 40]


def test_another_revision_replaces_the_one_that_is_there(hub: Hub, models_folder: Path) -> None:
    hub.files["old.json"] = b"[]"
    fetching.fetch(REPO)
    second = Checkpoint("someone/model", revision="v2")
    assert fetching.state_of(second) == "other revision"
    del hub.files["old.json"]
    assert fetching.fetch(second) and hub.downloads == ["c" * 40, "d" * 40]
    assert fetching.state_of(second) == "present" and second.exact_revision == "d" * 40
    assert "old.json" not in files_in(models_folder / "someone/model")
    assert fetching.state_of(Checkpoint("someone/model", revision="d" * 40)) == "present"
    with pytest.raises(ConfigError, match="wanted at two revisions, main and v2"):
        fetching.distinct([REPO, second])


def test_a_fetch_that_was_cut_off_does_not_count_as_present(hub: Hub) -> None:
    hub.failure = ConnectionError("reset\nby peer")
    with pytest.raises(fetching.FetchFailed, match=r"^someone/model cannot be fetched: ConnectionError: reset$"):
        fetching.fetch(REPO)
    assert fetching.state_of(REPO) == "incomplete" and not REPO.present
    hub.failure = None
    assert fetching.fetch(REPO) and fetching.state_of(REPO) == "present"


def test_damaged_weights_are_not_kept(hub: Hub, models_folder: Path) -> None:
    hub.damage = b"!"
    with pytest.raises(fetching.FetchFailed, match=r"model\.safetensors came damaged"):
        fetching.fetch(REPO)
    assert not (models_folder / "someone/model" / "model.safetensors").exists()
    assert fetching.state_of(REPO) == "incomplete"


@pytest.mark.parametrize("declared", [True, False])
def test_a_gated_repository_needs_a_token(hub: Hub, declared: bool, models_folder: Path) -> None:
    hub.gated = "manual"
    checkpoint = Checkpoint("someone/model", gated=declared)
    with pytest.raises(fetching.FetchFailed) as raised:
        fetching.fetch(checkpoint)
    assert "HF_TOKEN" in str(raised.value) and "https://huggingface.co/someone/model" in str(raised.value)
    assert hub.downloads == [] and not models_folder.exists()
    hub.token = "secret"
    assert fetching.fetch(checkpoint)


def test_what_the_hub_refuses_is_one_line_and_names_the_way_round(
    call: Call, hub: Hub, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "require_space", lambda *_: None)  # whatever disk the tests run on
    hub.failure = GatedRepoError("403 Client Error\n\nlong text")
    code, _, err = call("fetch", "--checkpoint", "someone/model")
    assert code == 2 and one_line(err) and "has no access: ask for it at https://huggingface.co/someone/model" in err
    hub.failure = None
    code, _, err = call("fetch", "--checkpoint", "someone/model", "--revision", "v9")
    assert code == 2 and one_line(err) and "has no revision 'v9'" in err
    hub.failure = ConnectionError("Name or service not known")
    code, out, err = call("fetch", "--set", DINOV2, "--set", "funnel.stages.label.backend=qwen2_5")
    assert code == 2 and one_line(err)
    assert "not fetched: facebook/dinov2-small, Qwen/Qwen2.5-32B-Instruct. Without network here: run" in err
    assert out.count("cannot be fetched: ConnectionError: Name or service not known") == 2
    assert f"set OPENWAVER_MODELS to the copy (now {models_folder})" in err


def test_without_the_hub_s_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendUnavailable, match="make setup-models"):
        fetching.fetch(REPO)


def test_the_hub_s_package_has_what_is_used_of_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    assert callable(hub.HfApi().repo_info) and callable(hub.snapshot_download) and callable(hub.get_token)
    found = hub.utils.filter_repo_objects(["a.json", "b/c.json", "d.bin"], allow_patterns=["*.json"])
    assert list(found) == ["a.json", "b/c.json"]
    assert issubclass(hub.errors.GatedRepoError, hub.errors.RepositoryNotFoundError)
    assert issubclass(hub.errors.RevisionNotFoundError, Exception)


def test_a_folder_of_one_s_own_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(fetching.FetchFailed, match="is a folder of your own"):
        fetching.fetch(Checkpoint(str(tmp_path / "mine")))


def test_declared_checkpoints_are_found_by_name() -> None:
    assert fetching.known_checkpoint("facebook/dinov2-base").size_mb == 346
    assert fetching.known_checkpoint("laion/aesthetic-v2-l14").url
    assert fetching.known_checkpoint("Qwen/Qwen2.5-7B-Instruct", "v1").revision == "v1"
    assert fetching.known_checkpoint("someone/unknown") == Checkpoint("someone/unknown")
