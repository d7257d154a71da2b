"""``python -m waver_core.synthetic --output DIR``: write the demo collection, random videos, or the training collection."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waver_core.synthetic import demo_collection, random_video, training_collection, write_collection


def _print_file(path: Path, known: dict[str, Any]) -> None:
    size_kib = path.stat().st_size / 1024
    print(
        f"{path}  {known['width_px']}x{known['height_px']}  {known['fps']:.2f} fps  {known['duration_s']:.1f} s  "
        f"{len(known['shots'])} shots  {size_kib:.0f} KiB",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m waver_core.synthetic", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="folder for the files, made if missing")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another collection (default 0)")
    parser.add_argument("--random", type=int, metavar="N", help="N random clean videos in place of the demo collection")
    parser.add_argument("--training", type=int, metavar="N", help="N small clips and pictures for a tiny model to learn from")
    parser.add_argument("--shots", type=int, default=5, metavar="K", help="shots in a random video (default 5)")
    options = parser.parse_args(arguments)
    for name in ("random", "shots", "training"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.seed < 0:
        parser.error("--seed must be 0 or more")
    if options.random is not None and options.training is not None:
        parser.error("--random and --training are two collections: give one of them")
    if options.training is not None:
        videos = training_collection(options.training, options.seed)
    elif options.random is None:
        videos = demo_collection(options.seed)
    else:
        videos = [random_video(options.seed + number, n_shots=options.shots) for number in range(options.random)]
    many = options.training is not None  # hundreds of files of a kind: one line for all
    write_collection(videos, options.output, on_file=None if many else _print_file)
    if many:
        print(f"{len(videos)} small clips and pictures in {options.output}", flush=True)


if __name__ == "__main__":
    main()
