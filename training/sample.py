"""Entry script: make a video or image from a prompt with an export, to look at what a stage has learned.

python training/sample.py --export out/training/t2v_192p_12fps/export --prompt "A red disc moves to the left." --output red.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from typing import Annotated

import torch
import typer

from training.previews import write_sample, write_sheet
from training.recipe import Recipe
from waver_core.command_line import new_console
from waver_core.command_line import run as run_command_line
from waver_core.config import validate
from waver_core.dit import DiTConfig, WaverDiT
from waver_core.errors import UserError
from waver_core.flow.guidance import Apg
from waver_core.generation import Generator, Task, encoders_by_name
from waver_core.pictures import fitted
from waver_core.registry import create
from waver_core.shapes import VideoShape, whole_frames
from waver_core.video import read_image
from waver_core.weights import Exported, load_export, load_into

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    export: Annotated[str, typer.Option("--export", help="Folder that a stage left: <output>/<stage>/export.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to show; repeat for several.")],
    output: Annotated[Path, typer.Option("--output", help="MP4 to write (PNG for an image); numbered for several prompts.")],
    seconds: Annotated[float | None, typer.Option(min=0, help="Length; 0 makes an image (default: the stage's longest).")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in px (default: the stage's first size).")] = None,
    first_frame: Annotated[str | None, typer.Option(help="Picture to start from (image-to-video).")] = None,
    last_frame: Annotated[str | None, typer.Option(help="Picture to end with.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the recipe's).")] = None,
    guidance: Annotated[float | None, typer.Option(min=1, help="Guidance scale (default: the recipe's).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another video.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write filmstrips of all prompts as one picture, too.")] = None,
) -> None:
    """Denoise from the averaged weights of an export."""
    exported = load_export(export)
    recipe: Recipe = validate(Recipe, exported.recipe, "recipe.yaml")
    if recipe.task == "refine":
        raise UserError(f"{export} is a refiner: it sharpens videos and makes none from a prompt")
    shape = _shape(recipe, seconds, size)
    pictures = [
        None if uri is None else fitted(read_image(uri), shape.height_px, shape.width_px) for uri in (first_frame, last_frame)
    ]
    generator = load_generator(exported, recipe)
    negative = ", ".join(recipe.negative_tags)
    tasks = [Task(text, shape, seed + k, negative, *pictures) for k, text in enumerate(prompt)]
    scale = recipe.sampling.guidance_scale if guidance is None else guidance
    latents = generator.latents(
        tasks,
        steps=steps or recipe.sampling.steps,
        shift=recipe.sampling.shift,
        guidance=Apg(scale=scale, norm_threshold=recipe.sampling.norm_threshold),
    )
    videos = generator.decode(latents)
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, video in enumerate(videos):
        stem = output.with_suffix("") if len(videos) == 1 else output.with_name(f"{output.stem}-{number:02d}")
        new_console().print(f"{write_sample(stem, video, recipe.fps)}  {prompt[number]}")
    if sheet is not None:
        write_sheet(sheet, videos)


def load_generator(exported: Exported, recipe: Recipe) -> Generator:
    """The model of an export with the encoders it was trained with, ready to generate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dit = WaverDiT(DiTConfig(**exported.model))
    load_into(dit, exported)
    autoencoder, text = encoders_by_name(recipe.encoders.model_dump(), create)
    return Generator(dit.to(device).eval(), autoencoder, text, recipe.data.text_multiple)


def _shape(recipe: Recipe, seconds: float | None, size: str | None) -> VideoShape:
    """Frames and size; raises `UserError` where they cannot be encoded."""
    height_px, width_px = (recipe.video_sizes or recipe.image_sizes)[0]
    if size is not None:
        width, separator, height = size.partition("x")
        if not separator or not width.isdigit() or not height.isdigit():
            raise UserError(f"--size takes WIDTHxHEIGHT such as 1280x720, not '{size}'")
        height_px, width_px = int(height), int(width)
    frames = recipe.frame_counts[-1] if recipe.frame_counts else 1
    if seconds is not None:
        frames = whole_frames(max(1, int(seconds * (recipe.fps or 1) + 0.5)))
    shape = VideoShape(frames, height_px, width_px)
    shape.latent  # noqa: B018 (refuses what cannot be encoded)
    return shape


if __name__ == "__main__":
    run_command_line(app)
