"""The app with a dispatcher that paints instead of a model that thinks: every stage, step, preview and end, in a second.

    python -m tests.serving.api.fake_dispatcher --port 8123 [--folder out/fake] [--step-s 0.05] [--no-refiner] [--keys keys.yaml]

Prompts steer it: "fail" ends in an error, "slow" takes ten times as long. Ready-made for the page and for tests of HTTP.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
import yaml

from serving.api import create_app
from serving.api.service import Service
from serving.jobs import Job
from serving.plan import facts
from serving.settings import Settings
from serving.store import JobStore
from waver_core.video import write_mp4, write_png

_MODEL = {
    "dual_blocks": 1,
    "single_blocks": 1,
    "heads": 2,
    "head_dim": 32,
    "text_dims": [64],
    "max_grid": [16, 32, 32],
}
STYLES = {"ghibli": "Ghibli animation style", "pixel": "pixel art style", "watercolour": "watercolour painting style"}


def write_export(folder: Path, *, task: str = "t2v", size: tuple[int, int] = (96, 160)) -> str:
    """A folder with the `recipe.yaml` of an export and no weights: enough to plan with. `size` is (height, width)."""
    encoders = {"autoencoder": {"backend": "dct"}, "text": [{"backend": "hashed_words"}]}
    recipe = {
        "stage": "refine_1080p" if task == "refine" else "t2v_480p",
        "task": task,
        "video_sizes": [list(size), list(size[::-1])],
        "image_sizes": [[size[0], size[0]]],
        "fps": 8.0,
        "encoders": encoders,
        "data": {"seconds": [2.0, 4.0], "captions": {"training_caption": 1.0}, "text_multiple": 1},
        "sampling": {"steps": 20, "shift": 7.0, "guidance_scale": 5.0, "norm_threshold": 27.0},
        "refinement": {"noise_min": 0.85, "noise_max": 0.95},
        "negative_tags": ["low quality", "slow motion"],
    }
    record = {
        "version": 1,
        "step": 12,
        "weights": "ema",
        "digest": "9e5628b30479689d53c76a70abee66aa",
        "lineage": [],
        "model": _MODEL,
        "encoders": {"autoencoder": "dct-1", "text": ["hashed_words-1"]},
        "recipe": recipe,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    return str(folder)


def make_service(folder: Path, *, refiner: bool = True, **serving: Any) -> Service:
    """A service over a new store in `folder`; `serving` as in pipelines.yaml (`queue={"max_queued": 2}`)."""
    cascade: dict[str, Any] = {"base": write_export(folder / "base"), "min_seconds": 1.0, **serving.pop("cascade", {})}
    if refiner:
        cascade["refiner"] = write_export(folder / "refiner", task="refine", size=(144, 240))
    storage = {"folder": str(folder / "store"), **serving.pop("storage", {})}
    settings = Settings.model_validate({"cascade": cascade, "storage": storage, "styles": STYLES, **serving})
    return Service(settings=settings, facts=facts(settings), store=JobStore(settings.database_url))


class FakeDispatcher:
    """A thread that claims jobs one by one and paints what they resolve to."""

    def __init__(self, service: Service, *, step_s: float = 0.0) -> None:
        self.service, self.step_s = service, step_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> FakeDispatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _loop(self) -> None:
        store = self.service.store
        while not self._stop.is_set():
            store.reclaim(30.0, 3)
            job = store.claim("fake")
            if job is None:
                self._stop.wait(0.01)
            elif not self._run(job):
                store.cancelled(job.id, job.attempt)

    def _run(self, job: Job) -> bool:
        """Make the job; False where it was to stop."""
        store, plan, prompt = self.service.store, job.resolved, job.request["prompt"]
        stages = {"rewrite": 1, "encode": 1, "base": plan["steps"]}
        stages |= {"upscale": 1, "refine": plan["refiner_steps"]} if plan["refine"] else {}
        stages |= {"decode": 2}
        all_steps, done = sum(stages.values()), 0
        seconds: dict[str, float] = {}
        for stage, steps in stages.items():
            began_s = time.perf_counter()
            for step in range(1, steps + 1):
                if self._stop.is_set():
                    return True
                if self.step_s:
                    time.sleep(self.step_s * (10 if "slow" in prompt else 1))
                done += 1
                every_step = self.step_s or step == steps  # without pauses one report a stage is enough
                if every_step and not store.report(
                    job.id, job.attempt, stage=stage, step=step, steps=steps, progress=done / all_steps
                ):
                    return False
                store.heartbeat("fake")
            seconds[stage] = time.perf_counter() - began_s
            store.add_stage_seconds(stage, seconds[stage])
            if stage in ("base", "refine"):
                store.add_steps(stage, steps)
            if stage == "rewrite":
                store.resolve(job.id, job.attempt, {"prompt": f"{prompt} In plain colours, seen from the front."})
            if stage == "base" and plan["refine"]:
                path = self._paint(job, "preview", plan["base_width_px"], plan["base_height_px"])
                store.preview(job.id, job.attempt, path)
            if stage == "base" and "fail" in prompt:
                store.fail(job.id, job.attempt, "out_of_memory", "The model ran out of memory: ask for a smaller size.", seconds)
                return True
        output = self._paint(job, "result", plan["width_px"], plan["height_px"])
        expires_at = time.time() + self.service.settings.storage.keep_hours * 3600
        store.complete(job.id, job.attempt, output=output, stage_seconds=seconds, expires_at=expires_at)
        return True

    def _paint(self, job: Job, name: str, width_px: int, height_px: int) -> str:
        """A square that moves over a ground, both coloured by the seed; the path relative to the storage folder."""
        plan = job.resolved
        image = plan["kind"] == "image"
        relative = f"jobs/{job.id}/{name}-{job.attempt}.{'png' if image else 'mp4'}"
        path = self.service.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(plan["seed"])
        ground, colour = random.integers(160, 256, 3), random.integers(0, 160, 3)
        side = min(width_px, height_px) // 3
        frames = []
        for k in range(plan["frames"]):
            frame = np.broadcast_to(ground, (height_px, width_px, 3)).astype(np.uint8)
            left = int((width_px - side) * k / max(1, plan["frames"] - 1))
            frame[side : 2 * side, left : left + side] = colour
            frames.append(frame)
        if image:
            write_png(str(path), frames[0])
        else:
            write_mp4(str(path), frames, fps=plan["fps"])
        return relative


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step-s", type=float, default=0.05)
    parser.add_argument("--no-refiner", action="store_true")
    parser.add_argument("--keys", help="a key file (http.api_keys)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="waver-fake-"))
    service = make_service(folder, refiner=not options.no_refiner, http={"api_keys": options.keys})
    with FakeDispatcher(service, step_s=options.step_s):
        uvicorn.run(create_app(service), host="127.0.0.1", port=options.port, log_level="info", timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
