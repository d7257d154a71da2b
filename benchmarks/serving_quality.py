"""Whether what comes out of the server shows what was asked for: the measures of `benchmarks/learning.py`, over HTTP and MP4."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import adherence, common
from benchmarks.learning import psnr
from benchmarks.serving_process import ServerProcess
from serving.plan import Facts, checkpoints
from serving.settings import Settings
from waver_core.registry import create
from waver_core.synthetic.training_collection import training_collection
from waver_core.video import decode

CLIENTS = 2
STILL_FRAMES = 9
"""The captioner looks at clips: an image is shown to it so often."""


def user_prompt(prompt: adherence.Prompt) -> str:
    """What a person types: "red disc moving left"."""
    return f"{prompt.colour} disc moving {prompt.direction}"


def measure(server: ServerProcess, settings: Settings, known: Facts, rounds: int, stills: int) -> dict[str, Any]:
    """All of it, with tables: adherence of videos by kind of prompt, of images, and how given first frames are kept."""
    ways: dict[str, dict[str, Any]] = {"caption, base alone": {"rewrite": False, "refine": False}}
    if known.refiner:
        ways["caption, refined"] = {"rewrite": False}
    ways |= {"user's words, rewritten": {"rewrite": True}, "user's words as they are": {"rewrite": False}}
    figures: dict[str, Any] = {}
    for name, options in ways.items():
        results = videos(server, rounds, "caption" not in name, known.fps or 4.0, options)
        figures[name] = {"samples": len(results), **adherence.shares(results)}
    rows = [(name, f["samples"], *(f"{f[k]:.0%}" for k in ("colour", "direction", "both"))) for name, f in figures.items()]
    common.print_table("Videos that show what was asked for", ("prompt", "samples", "colour", "direction", "both"), rows)
    images = figures["images"] = measure_images(server, stills, known.default_size)
    common.console().print(
        f"{images['images']} images: PNG of {known.default_size}, in {images['colour']:.0%} a thing of the colour asked for"
    )
    figures["first_frame"] = found = measure_first_frames(server, settings, known, stills)
    common.print_table("First frame of the video against the one given, dB", ("measure", "value"), list(found.items()))
    return figures


def videos(server: ServerProcess, rounds: int, in_users_words: bool, fps: float, options: dict[str, Any]) -> list[Any]:
    """Verdicts on `rounds` videos of each of the 24 prompts, with the seeds of the training benchmark."""
    prompts = [(adherence.prompts(1000 + r), 100_000 * (1000 + r)) for r in range(rounds)]
    asked = [(p, first + k) for some, first in prompts for k, p in enumerate(some)]

    def one(item: tuple[adherence.Prompt, int]) -> bytes:
        prompt, seed = item
        return server.generate(prompt=user_prompt(prompt) if in_users_words else prompt.short, seed=seed, **options)[0]

    with ThreadPoolExecutor(CLIENTS) as pool:
        files = list(pool.map(one, asked))
    return [(prompt, adherence.judge(frames_of(file), fps, prompt)) for (prompt, _), file in zip(asked, files, strict=True)]


def measure_images(server: ServerProcess, count: int, size: str) -> dict[str, Any]:
    """Images of the captions: that they are PNGs of the right size, and the share of right colours. A still has no direction."""
    right, prompts = [], adherence.prompts(1000)
    for number, prompt in enumerate(prompts[:: max(1, len(prompts) // count)][:count]):
        data, _ = server.generate(prompt=prompt.short, kind="image", rewrite=False, seed=number)
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG" or f"{image.width}x{image.height}" != size:
                raise SystemExit(f"an image came as {image.format} of {image.width}x{image.height}, not as PNG of {size}")
            still = np.asarray(image.convert("RGB"))
        right.append(adherence.judge(np.repeat(still[None], STILL_FRAMES, axis=0), 4.0, prompt).colour_right)
    return {"images": len(right), "colour": float(np.mean(right))}


def measure_first_frames(server: ServerProcess, settings: Settings, known: Facts, clips: int) -> dict[str, float]:
    """Mean PSNR of the first frame to the picture that was given, by the base alone at its own size and refined; beside it what
    the codec and the MP4 can reach at all, and what the same prompts and seeds give without a picture."""
    scenes = [v for v in training_collection(clips * 2, 2000) if v.file.suffix == ".mp4"][:clips]
    checkpoint, _ = checkpoints(settings)
    sizes = {"base alone": (checkpoint.recipe["video_sizes"][0], {"refine": False})}
    if known.refiner:
        width, height = (int(n) for n in known.default_size.split("x"))
        sizes["refined"] = ((height, width), {})
    codec: Any = create("video_autoencoder", checkpoint.recipe["encoders"]["autoencoder"]["backend"])
    found: dict[str, float] = {}
    for name, ((height, width), options) in sizes.items():
        true = [adherence.tiny_clip(v, 1, known.fps or 4.0, height) for v in scenes]
        if height != width:
            true = [cv2.resize(clip[0], (width, height), interpolation=cv2.INTER_AREA)[None] for clip in true]
        rest = {"rewrite": False, **options}
        prompts = [adherence.prompt_for(v).short for v in scenes]
        given, free = (
            [
                frames_of(server.generate(prompt=p, seed=k, **rest, **({"first_frame": _png(t[0])} if shown else {}))[0])[0]
                for k, (p, t) in enumerate(zip(prompts, true, strict=True))
            ]
            for shown in (True, False)
        )
        found[name] = _mean_psnr(given, true)
        found[f"{name}, worst"] = float(min(psnr(a, b[0]) for a, b in zip(given, true, strict=True)))
        found[f"{name}, without the picture"] = _mean_psnr(free, true)
        found[f"codec alone, {width}x{height}"] = _mean_psnr([c[0] for c in codec.decode(codec.encode(true))], true)
    return found


def _mean_psnr(frames: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> float:
    return float(np.mean([psnr(a, b[0]) for a, b in zip(frames, true, strict=True)]))


def frames_of(mp4: bytes) -> np.ndarray:
    """uint8 [T, H, W, 3] of a file as it came."""
    with tempfile.TemporaryDirectory(prefix="openwaver-") as folder:
        path = Path(folder) / "video.mp4"
        path.write_bytes(mp4)
        return decode(str(path))


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
