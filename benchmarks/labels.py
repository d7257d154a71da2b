"""Labels and balance of synthetic captions: rate and memory of the embedded labeler in one process, and of the funnel's own
steps on Ray Data: the label pass, then the counts and the weights of a balanced tier.

The captions are made from templates and the taxonomy, always the same ones for a number and a seed: one to five sentences
about a place, a person or a thing, its looks, the light and the camera; four in five tell an action of the taxonomy, at
times as "while" the beginning of another, the rest none. About 60 words on average.

    python benchmarks/labels.py --captions 1000000
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from curation.balance import KEYS, SUBJECT_FIRST, group_weights
from curation.executor import OnRay, connect
from curation.llm_pass import units_of_clips
from curation.passes import later_passes
from curation.stage import load_stages
from curation.text_pass import TextPass
from curation.workfolder import WorkFolder
from waver_core.backends.contracts import NO_ACTION
from waver_core.config import load_config
from waver_core.manifest import publish, read_index
from waver_core.registry import create
from waver_core.taxonomy import load_taxonomy

NO_ACTION_SHARE = 0.2
_PEOPLE = ("a young woman with long dark hair", "an old man in a grey coat", "a boy in a striped shirt", "two friends", "a woman")
_PLACES = (
    "in a sunlit park",
    "in a small room with white walls",
    "on a quiet street",
    "under a cloudy sky",
    "near a wooden fence",
)
_SCENES = (
    "A wide view of a valley with pine trees, a narrow river and snow-covered peaks in the distance.",
    "A still life with a ceramic jug, two lemons and a linen cloth on a rough wooden table.",
    "The interior of an old library with tall shelves, green lamps and a long oak table in the middle.",
    "A portrait of an elderly man with a white beard and deep wrinkles in front of a plain dark background.",
)
_DETAILS = (
    "Soft warm light from the left creates long shadows and a calm, intimate atmosphere.",
    "In the background there are several blurred buildings, a row of parked cars and a few leafless trees.",
    "The colors are muted, with tones of brown and green, and the focus is sharp on the subject in the foreground.",
    "A pair of running shoes and a blue bag are visible in the lower corner, next to a painted wall.",
    "The overall style is realistic and cinematic, with a shallow depth of field and fine film grain.",
    "The scene is set at dusk, and the sky behind the rooftops is a gradient of orange and violet.",
    "He wears a red cap and a pair of round glasses, without any jewelry or visible tattoos.",
)
_CAMERA = (
    "The camera slowly pans right and then tilts up.",
    "The camera remains static at eye level throughout the clip.",
    "It is a medium shot from a low angle.",
)
app = common.new_app()


def captions(count: int, seed: int = 7) -> list[str]:
    """`count` captions, the same for the same seed."""
    rng = random.Random(seed)
    labels = [(path.level1 in SUBJECT_FIRST, path.level3) for path in load_taxonomy()]
    return [_caption(rng, labels) for _ in range(count)]


def _caption(rng: random.Random, labels: list[tuple[bool, str]]) -> str:
    if rng.random() < NO_ACTION_SHARE:
        first = rng.choice(_SCENES)
    else:
        of_thing, label = rng.choice(labels)
        told = f"A {label}" if of_thing else f"{rng.choice(_PEOPLE).capitalize()} is {label}"
        first = f"{told} {rng.choice(_PLACES)}."
        if rng.random() < 0.3:
            other_of_thing, other = rng.choice(labels)
            second = f"a {other}" if other_of_thing else f"{rng.choice(_PEOPLE)} is {other}"
            first = f"{first[:-1]}, while {second} beside."
    details = rng.sample(_DETAILS, rng.choice((0, 1, 2, 3, 4)))
    camera = [rng.choice(_CAMERA)] if rng.random() < 0.6 else []
    return " ".join([first, *details, *camera])


def measure(count: int, batch: int = 1024) -> dict[str, Any]:
    """Time one labeler in this process over `count` captions, batch by batch."""
    texts = captions(count)
    started = time.perf_counter()
    labeler = create("action_labeler", "lexical")
    built = time.perf_counter()
    labelled = 0
    spent = time.process_time()
    for first in range(0, count, batch):
        labelled += sum(label != NO_ACTION for label in labeler.label(texts[first : first + batch]))
    wall_s, cpu_s = time.perf_counter() - built, time.process_time() - spent
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {
        "captions": count,
        "words_per_caption": sum(len(text.split()) for text in texts) / count,
        "labels": load_taxonomy().counts[2],
        "build_s": built - started,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "captions_per_s": count / wall_s,
        "captions_per_cpu_s": count / cpu_s,
        "labelled_share": labelled / count,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    }


def run_on_ray(folder: str, count: int) -> None:
    """Label `count` captions and weigh a tier on Ray Data with the funnel's own code; prints the figures as JSON.

    Run in a process of its own, so that its memory and its workers' can be followed.
    """
    config = load_config()
    stages = load_stages(config)
    part = next(p for p in later_passes(config, stages) if p.name == "label")
    work = WorkFolder(folder, {"shots": "bench", "label": part.key}, "bench")
    work.prepare()
    clips = pa.table(
        {
            "clip_id": [f"00000000-0000-5000-8000-{k:012d}" for k in range(count)],
            "caption": captions(count),
            "dataset": [f"set-{k % 97 % 5}" for k in range(count)],
            "reason_ct": pa.array([None if k % 10 else "text" for k in range(count)], pa.string()),
        }
    )
    execute = OnRay()
    connect()
    started = time.perf_counter()
    resources = config.funnel.resources("label")
    units = units_of_clips(clips.select(["clip_id", "caption"]), part)
    done = sum(row["items"] for row in execute.run(TextPass, (config, work, "label"), units, resources))
    labelled = time.perf_counter()
    labels, _ = work.read("label", part.schema(stages))
    at = pc.index_in(clips["clip_id"], labels["clip_id"].combine_chunks()).combine_chunks()
    joined = clips.drop_columns(["caption"])
    for name in ("label_1", "label_2", "label_3"):
        joined = joined.append_column(name, labels[name].take(at))
    publish(f"{folder}/clips", joined, rows_per_shard=100_000, facts={})
    published = time.perf_counter()
    uris = [f"{folder}/clips/{name}" for name in read_index(f"{folder}/clips")["shards"]]
    groups = execute.count(uris, KEYS, {"ct": "reason_ct"})
    weights = group_weights(groups, groups["ct"].to_numpy(), stages.named("balance").options)
    weighed = time.perf_counter()
    drawn = groups["ct"].to_numpy() * weights
    figures = {
        "captions": done,
        "label_s": labelled - started,
        "captions_per_s": done / (labelled - started),
        "join_s": published - labelled,
        "balance_s": weighed - published,
        "rows_per_s": done / (weighed - published),
        "groups": len(groups),
        "mean_weight": float(drawn.sum() / groups["ct"].to_numpy().sum()),
        "largest_weight": float(weights.max()),
    }
    print(json.dumps(figures))


def measure_on_ray(count: int) -> dict[str, Any]:
    """`run_on_ray` in a child process, with the memory of it and all its workers."""
    with tempfile.TemporaryDirectory() as folder, common.Usage(memory=True) as usage:
        call = f"from benchmarks.labels import run_on_ray; run_on_ray({folder!r}, {count})"
        done = subprocess.run([sys.executable, "-c", call], cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"labelling on Ray failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**figures, **usage.figures()}


@app.command()
def main(
    count: Annotated[int, typer.Option("--captions", help="Captions to label on Ray Data.", min=1)] = 1_000_000,
    single: Annotated[int, typer.Option(help="Captions to label in one process.", min=1)] = 100_000,
    save: common.Save = False,
) -> None:
    """Captions labelled and balanced a second, and the memory that takes."""
    before = common.machine()
    figures = {"one_process": measure(single), "ray_data": measure_on_ray(count)}
    for name, found in figures.items():
        common.print_table(name, ("figure", "value"), list(found.items()))
    common.finish("labels", figures, save, before)


if __name__ == "__main__":
    app()
