"""Does a tiny model learn what its captions say? Rendered scenes, captioned by the funnel, train it; prompts over six colours and
four directions are sampled from it; the funnel's own captioner looks at what came out. All on this machine, without weights.

    python benchmarks/learning.py --sheet out/bench/learning.png

Scenes, captions and prompts are as `benchmarks/adherence.py` tells; the noise of the samples has seeds of its own, so no sample
was ever seen. `--i2v-steps` goes on with image-to-video training and measures how well the given first frame is kept.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import adherence, common
from training.recipe import Recipe
from training.sample import load_generator
from training.trackers import read_metrics
from waver_core.flow.guidance import Apg
from waver_core.generation import Generator, Task
from waver_core.shapes import VideoShape
from waver_core.synthetic.training_collection import training_collection
from waver_core.weights import load_export

app = common.new_app()
_PROFILES = ("--profile", "embedded", "--profile", "tiny")
_T2V, _I2V = "t2v_192p_12fps", "t2v_480p"


def curated(clips: int, seed: int, work: Path) -> Path:
    """The funnel's output on a rendered collection; made once."""
    folder = work / f"learning-{clips}-{seed}"
    if not (folder / "curated" / "tiers" / "192p" / "manifest.json").exists():
        _run("-m", "waver_core.synthetic", "--training", str(clips), "--seed", str(seed), "--output", str(folder / "videos"))
        _run(
            *("curation/run_funnel.py", "--profile", "tiny"),
            *("--input", str(folder / "videos"), "--output", str(folder / "curated")),
        )
    return folder / "curated"


def train(stage: str, output: Path, source: Path, *settings: str) -> None:
    """One stage in this process's environment, without Ray: what is measured is learning."""
    sets = [word for setting in settings for word in ("--set", setting)]
    _run(
        *("training/stage.py", "--serial", "--stage", stage, *_PROFILES, *sets),
        *("--curated", str(source), "--output", str(output)),
    )


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=common.ROOT, check=True)


def loaded(output: Path, stage: str) -> tuple[Generator, Recipe]:
    """What a stage has exported, ready to generate."""
    exported = load_export(str(output / stage / "export"))
    recipe = Recipe.model_validate(exported.recipe)
    return load_generator(exported, recipe), recipe


def sampled(generator: Generator, recipe: Recipe, tasks: list[Task], hold: bool = True) -> list[np.ndarray]:
    """uint8 [T, H, W, 3] of every task, with the recipe's own sampling."""
    sampling = recipe.sampling
    guidance = Apg(scale=sampling.guidance_scale, norm_threshold=sampling.norm_threshold)
    latents = generator.latents(tasks, steps=sampling.steps, shift=sampling.shift, guidance=guidance, hold=hold)
    return generator.decode(latents)


def adherence_of(generator: Generator, recipe: Recipe, rounds: int, seed: int) -> tuple[list[Any], dict[Any, np.ndarray]]:
    """Verdicts on `rounds` samples of each of the 24 prompts, and the first sample of each for the sheet."""
    results: list[Any] = []
    first: dict[Any, np.ndarray] = {}
    for number in range(rounds):
        prompts = adherence.prompts(seed + number)
        shape = VideoShape(recipe.frame_counts[-1], *recipe.video_sizes[0])
        tasks = [Task(p.short, shape, 100_000 * (seed + number) + k) for k, p in enumerate(prompts)]
        for prompt, video in zip(prompts, sampled(generator, recipe, tasks), strict=True):
            results.append((prompt, adherence.judge(video, recipe.fps or 4.0, prompt)))
            first.setdefault((prompt.colour, prompt.direction), video)
    return results, first


def first_frames(generator: Generator, recipe: Recipe, clips: int, seed: int) -> dict[str, float]:
    """How near the first frame of image-to-video samples is to the given one: mean PSNR, held as `Generator.latents` does and as
    the model copies it by itself, beside that of the codec alone (what could be reached) and that of text-to-video with the same
    prompts and seeds (what chance gives). Scenes of another seed. The step ratio is the change from the first frame to the second
    over that of the true clips, which a first frame that was merely pasted in would raise."""
    size = recipe.video_sizes[0]
    videos = [v for v in training_collection(clips * 2, seed) if v.file.suffix == ".mp4"][:clips]
    true = [adherence.tiny_clip(v, recipe.frame_counts[-1], recipe.fps or 4.0, size[0]) for v in videos]
    frames = [clip[0] for clip in true]
    prompts = [adherence.prompt_for(v).short for v in videos]
    shape = VideoShape(recipe.frame_counts[-1], *size)
    given = [Task(p, shape, seed + k, first_frame=f) for k, (p, f) in enumerate(zip(prompts, frames, strict=True))]
    free = [Task(p, shape, seed + k) for k, p in enumerate(prompts)]
    codec = generator.autoencoder.decode(generator.autoencoder.encode([f[None] for f in frames]))
    passed = generator.autoencoder.decode(generator.autoencoder.encode(true))
    made, copied, chance = (sampled(generator, recipe, tasks, h) for tasks, h in ((given, True), (given, False), (free, True)))
    verdicts = [adherence.judge(m, recipe.fps or 4.0, adherence.prompt_for(v)) for m, v in zip(made, videos, strict=True)]
    return {
        "i2v_first_frame_psnr_db": float(np.mean([psnr(m[0], f) for m, f in zip(made, frames, strict=True)])),
        "i2v_first_frame_worst_db": float(np.min([psnr(m[0], f) for m, f in zip(made, frames, strict=True)])),
        "i2v_unheld_psnr_db": float(np.mean([psnr(m[0], f) for m, f in zip(copied, frames, strict=True)])),
        "i2v_first_step_ratio": _first_step(made) / _first_step(passed),
        "codec_psnr_db": float(np.mean([psnr(c[0], f) for c, f in zip(codec, frames, strict=True)])),
        "t2v_first_frame_psnr_db": float(np.mean([psnr(c[0], f) for c, f in zip(chance, frames, strict=True)])),
        "i2v_colour": float(np.mean([v.colour_right for v in verdicts])),
        "i2v_direction": float(np.mean([v.direction_right for v in verdicts])),
    }


def _first_step(clips: list[np.ndarray]) -> float:
    """Mean squared change from the first frame to the second."""
    return float(np.mean([np.mean((c[1].astype(np.float64) - c[0].astype(np.float64)) ** 2) for c in clips]))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures, dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


@app.command()
def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time of the text-to-video stage.")] = 6.0,
    clips: Annotated[int, typer.Option(min=24, help="Files in the rendered collection.")] = 480,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each of the 24 prompts.")] = 4,
    i2v_steps: Annotated[int, typer.Option(min=0, help="Steps of the image-to-video stage after it; 0 leaves it out.")] = 800,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the collection; samples have others.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write the samples as a picture.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the training run (default: below --work).")] = None,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Train, sample, and let the captioner judge."""
    before = common.machine()
    source = curated(clips, seed, work)
    run = output or work / f"learning-run-{int(time.time())}"
    limits = f"training.stages.{_T2V}.schedule={{max_minutes: {minutes}, max_steps: 100000}}"
    train(_T2V, run, source, limits, "training.sampling.every_steps=0")
    generator, recipe = loaded(run, _T2V)
    steps = read_metrics(run / _T2V)[-1]["step"]
    results, videos = adherence_of(generator, recipe, rounds, 1000)
    found: dict[str, Any] = {"minutes": minutes, "steps": steps, "samples": len(results), **adherence.shares(results)}
    columns = ("colour", *adherence.TRAINING_DIRECTIONS, "all")
    title = f"Colour / direction as prompted, {len(results)} samples after {minutes:g} minutes ({steps:,} steps)"
    common.print_table(title, columns, adherence.table(results))
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        said = dict.fromkeys(videos, "")
        for prompt, verdict in results[: len(videos)]:
            marks = [word if right else f"not {word}" for word, right in zip((prompt.colour, prompt.direction), verdict[:2])]
            said[prompt.colour, prompt.direction] = ", ".join(marks)
        adherence.contact_sheet(videos, said).save(sheet)
    if i2v_steps:
        train(_I2V, run, source, f"training.stages.{_I2V}.schedule.max_steps={i2v_steps}", "training.sampling.every_steps=0")
        generator, recipe = loaded(run, _I2V)
        found |= {"i2v_steps": i2v_steps, **first_frames(generator, recipe, 24, 2000)}
        shown = [(name, value) for name, value in found.items() if name.startswith(("i2v_", "codec", "t2v_first"))]
        common.print_table(f"Image-to-video after {i2v_steps} more steps", ("measure", "value"), shown)
    found["threads"] = torch.get_num_threads()
    common.finish("learning", found, save, before)


if __name__ == "__main__":
    app()
