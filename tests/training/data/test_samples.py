"""Manifests to samples: what is chosen, what is counted as lost, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.samples import MENDS, SampleTable, build_samples, check_dropped
from training.recipe import Recipe
from waver_core.errors import UserError
from waver_core.manifest import publish
from waver_core.shapes import VideoShape

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("clip_id", "source_id", "source_uri", "kind", "training_caption", "caption_short")),
        *((name, pa.float64()) for name in ("start_s", "end_s", "duration_s", "fps", "sampling_weight")),
        *((name, pa.int32()) for name in ("width_px", "height_px", "short_side_px")),
        ("technical_active_box", pa.list_(pa.int32(), 4)),
    ]
)
FACTS = {"tier": "480p", "backends": {"caption": {"captioner": "attributes-1"}}, "passes": {"scores": "aa"}}


def make_recipe(**changes: Any) -> Recipe:
    """A stage of 480p videos and images at 16 fps; `data` is merged."""
    base: dict[str, Any] = {
        "stage": "t2v_480p",
        "task": "t2v",
        "after": None,
        "tier": "480p",
        "video_sizes": ((480, 864), (864, 480)),
        "image_sizes": ((480, 864), (864, 480)),
        "fps": 16,
        "epochs": 1,
        "shift": 1,
        "model": {"preset": "tiny"},
        "encoders": {"autoencoder": {"backend": "dct"}, "text": [{"backend": "hashed_words"}]},
        "optimizer": {"lr": 1e-4},
        "timesteps": {"image": {"distribution": "uniform"}, "video": {"distribution": "uniform"}},
        **{name: {} for name in ("data", "alignment", "refinement", "sampling", "schedule", "workers")},
    }
    return Recipe(**{**base, **changes})


def clip(number: int, **changes: Any) -> dict[str, Any]:
    """A clip of 5 s of a 1080p video at 24 fps; `source` names its source."""
    source = changes.pop("source", f"s{number}")
    row = {
        "clip_id": f"clip-{number:04d}",
        "source_id": source,
        "source_uri": f"/raw/{source}.mp4",
        "kind": "video",
        "training_caption": f"caption {number}",
        "caption_short": f"short {number}",
        "start_s": 10.0,
        "duration_s": 5.0,
        "fps": 24.0,
        "sampling_weight": 1.0,
        "width_px": 1920,
        "height_px": 1080,
    }
    row |= changes
    sides = (row["width_px"], row["height_px"])
    return {**row, "short_side_px": None if None in sides else min(sides)}


def image(number: int, **changes: Any) -> dict[str, Any]:
    """The same as a picture."""
    return clip(number, **{"kind": "image", "start_s": 0.0, "duration_s": 0.0, "fps": None, **changes})


def write(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> str:
    """Publish a manifest in two shards."""
    table = pa.Table.from_pylist([{n: row.get(n) for n in SCHEMA.names} for row in rows], schema=SCHEMA)
    publish(str(folder), table, rows_per_shard=max(1, len(rows) // 2), facts={**FACTS, **facts})
    return str(folder)


def samples_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> SampleTable:
    """Publish and build."""
    return build_samples([write(folder, rows)], make_recipe(**changes))


def test_a_clip_takes_the_longest_duration_it_fills_in_its_middle_on_a_frame_of_the_source(tmp_path: Path) -> None:
    (row,) = samples_of(tmp_path, [clip(0, technical_active_box=[0, 10, 1920, 1070])]).table.to_pylist()
    assert (row["frames"], row["height_px"], row["width_px"], row["fps"]) == (77, 480, 864, 16.0)  # 5 s are 80 frames
    spare_s = 5.0 - 77 / 16
    assert row["start_s"] == pytest.approx(10 + int(spare_s / 2 * 24) / 24)
    assert row["captions"] == ["caption 0"] and row["weight"] == 1.0 and row["held_out"] is False
    assert row["active_box"] == [0, 10, 1920, 1070]
    assert len(row["sample_id"]) == 32


@given(
    duration_s=st.floats(0.5, 12), fps=st.floats(10, 60), windows=st.integers(1, 5), wanted_fps=st.sampled_from([4.0, 12.0, 24.0])
)
def test_windows_lie_within_their_clip_and_apart(
    tmp_path_factory: pytest.TempPathFactory, duration_s: float, fps: float, windows: int, wanted_fps: float
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    recipe = make_recipe(fps=wanted_fps, data={"windows": windows})
    manifest = write(folder, [clip(0, duration_s=duration_s, fps=fps), clip(1)])  # the second is always usable
    table = build_samples([manifest], recipe).table
    rows = [row for row in table.to_pylist() if row["clip_id"] == "clip-0000"]
    if fps < 0.9 * wanted_fps or duration_s < recipe.frame_counts[0] / wanted_fps - 2e-3:
        assert not rows
    for row in rows:
        assert row["start_s"] >= 10 and row["start_s"] + row["frames"] / wanted_fps <= 10 + duration_s + 2e-3
        longer = [count for count in recipe.frame_counts if count > row["frames"]]
        assert not longer or longer[0] / wanted_fps > duration_s
        assert ((row["start_s"] - 10) * fps) % 1 == pytest.approx(0, abs=2e-3) or ((row["start_s"] - 10) * fps) % 1 > 0.998
    assert len(rows) <= windows and len({row["start_s"] for row in rows}) == len(rows)
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert not rows or sum(row["weight"] for row in rows) == pytest.approx(1)


def test_windows_are_spread_evenly(tmp_path: Path) -> None:
    table = samples_of(tmp_path, [clip(0, duration_s=10.0)], data={"windows": 4, "seconds": (2,)}).table
    starts = [s - 10 for s in table["start_s"].to_pylist()]
    spare_s = 10 - 29 / 16
    assert starts == pytest.approx([spare_s * (k + 0.5) / 4 for k in range(4)], abs=1 / 24)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(1920, 1080, (480, 864)), (1080, 1920, (864, 480)), (2048, 858, (480, 864)), (1440, 1080, (480, 864)), (1000, 1000, None)],
)
def test_the_nearest_aspect_ratio_is_taken(tmp_path: Path, width: int, height: int, size: tuple[int, int] | None) -> None:
    built = samples_of(tmp_path, [clip(0, width_px=width, height_px=height), clip(1)], data={"min_kept_area": 0.74})
    found = [(r["height_px"], r["width_px"]) for r in built.table.to_pylist() if r["clip_id"] == "clip-0000"]
    assert found == ([size] if size else [])  # 2.39:1 and 4:3 keep about 75 % of the picture, a square 56 %
    assert built.dropped["video"] == ({} if found else {"aspect_ratio": 1})


def test_of_several_sizes_the_largest_that_needs_no_enlargement(tmp_path: Path) -> None:
    sizes = ((720, 1280), (1280, 720), (1080, 1920), (1920, 1080))
    pictures = [(1920, 1080), (1919, 1080), (1600, 900), (1280, 720), (1100, 640), (2160, 3840)]
    rows = [image(k, width_px=w, height_px=h) for k, (w, h) in enumerate(pictures)]
    table = samples_of(tmp_path, [*rows, clip(9)], image_sizes=sizes).table
    found = {r["clip_id"][-1]: (r["height_px"], r["width_px"]) for r in table.to_pylist() if r["kind"] == "image"}
    assert found == {"0": (1080, 1920), "1": (1080, 1920), "2": (720, 1280), "3": (720, 1280), "5": (1920, 1080)}
    grown = samples_of(tmp_path / "grown", [*rows, clip(9)], image_sizes=sizes, data={"max_upscale": 1.25}).table
    assert len(grown) == len(table) + 1


def test_images_are_single_frames_with_their_own_sizes(tmp_path: Path) -> None:
    built = samples_of(tmp_path, [image(0, width_px=500, height_px=500), clip(1)], image_sizes=((256, 256), (192, 336)))
    (row,) = [r for r in built.table.to_pylist() if r["kind"] == "image"]
    assert (row["frames"], row["fps"], row["height_px"], row["width_px"]) == (1, 0.0, 256, 256)
    assert VideoShape(row["frames"], row["height_px"], row["width_px"]).latent.tokens == 256


def test_every_loss_is_counted_with_its_reason_and_its_kind(tmp_path: Path) -> None:
    rows = [
        clip(0),
        clip(1, training_caption=None),
        clip(2, training_caption="  "),
        clip(3, fps=14.0),
        clip(4, fps=None),
        clip(5, duration_s=1.5),
        clip(6, width_px=1000, height_px=1000),
        clip(7, width_px=640, height_px=360),
        clip(8, width_px=None),
        clip(9, fps=15.0),  # within a tenth of 16
        clip(10, width_px=854, height_px=480),  # 864 is 854 rounded
        image(11),
        image(12, training_caption=""),
        clip(13, duration_s=None),
    ]
    built = samples_of(tmp_path, rows)
    assert set(built.table["clip_id"].to_pylist()) == {"clip-0000", "clip-0009", "clip-0010", "clip-0011"}
    lost = {"no_caption": 2, "frame_rate": 2, "too_short": 2, "aspect_ratio": 1, "too_small": 1, "unknown_size": 1}
    assert built.dropped == {"video": lost, "image": {"no_caption": 1}}
    assert set(lost) == set(MENDS)
    with pytest.raises(UserError, match=r"75\.0% of its video clips \(9 of 12\).*2 no_caption \(see data\.captions\)") as error:
        check_dropped(built.dropped, built.table, make_recipe())
    assert "data.max_dropped_share (10.0%)" in str(error.value) and "\n" not in str(error.value)
    assert check_dropped(built.dropped, built.table, make_recipe(data={"max_dropped_share": 0.8}))["image"] == 0.5


def test_what_a_stage_does_not_ask_for_is_no_loss(tmp_path: Path) -> None:
    built = samples_of(tmp_path, [clip(0, width_px=2560, height_px=1440), clip(1), image(2)], min_short_side_px=1440)
    assert len(built.table) == 1 and built.dropped == {"video": {}, "image": {}}
    assert built.facts["unwanted"] == {"video": 1, "image": 1}
    pictures = {"task": "t2i", "video_sizes": (), "fps": None}
    built = build_samples([str(tmp_path)], make_recipe(**pictures))
    assert built.table["kind"].to_pylist() == ["image"] and built.facts["unwanted"]["video"] == 2


def test_captions_keep_their_order_and_fill_their_gaps(tmp_path: Path) -> None:
    captions = {"caption_short": 0.3, "training_caption": 0.7}
    rows = [clip(0), clip(1, caption_short=None), clip(2, training_caption=" ")]
    table = samples_of(tmp_path, rows, data={"captions": captions}).table
    assert table["captions"].to_pylist() == [["short 0", "caption 0"], ["caption 1", "caption 1"], ["short 2", "short 2"]]


def test_the_order_of_manifests_and_shards_changes_nothing_and_no_clip_comes_twice(tmp_path: Path) -> None:
    rows = [clip(k, source=f"s{k // 2}", start_s=float(k % 2 * 6)) for k in range(10)]
    a, b = write(tmp_path / "a", rows[:6]), write(tmp_path / "b", rows[:3:-1])
    one, two = build_samples([a, b], make_recipe()), build_samples([b, a, a + "/"], make_recipe())
    assert one.table.equals(two.table)
    assert one.table["clip_id"].to_pylist() == [f"clip-{k:04d}" for k in range(10)]
    assert one.facts["duplicates"] == two.facts["duplicates"] == 2


@pytest.mark.parametrize(("n", "share", "cap"), [(400, 0.1, 256), (400, 0.1, 7), (25, 1e-6, 256), (10, 1e-6, 256), (5, 0.99, 9)])
def test_sources_are_held_out_whole_and_never_all(tmp_path: Path, n: int, share: float, cap: int) -> None:
    rows = [clip(k, source=f"s{k // 2}", start_s=float(k % 2 * 6)) for k in range(2 * n)]
    data = {"held_out_share": share, "max_held_out": cap}
    built = samples_of(tmp_path, rows, data=data)
    by_source: dict[str, set[bool]] = {}
    for row in built.table.to_pylist():
        by_source.setdefault(row["source_id"], set()).add(row["held_out"])
    assert all(len(states) == 1 for states in by_source.values())
    held = {source for source, states in by_source.items() if states == {True}}
    assert len(held) == built.facts["held_out_sources"] <= min(cap, n - 1)
    assert bool(held) == (n >= 20 or share > 0.5)
    if cap == 256 and share == 0.1:
        assert 25 <= len(held) <= 55
        half = [row for row in rows if int(row["source_id"][1:]) % 2]
        again = {r["source_id"] for r in samples_of(tmp_path / "half", half, data=data).table.to_pylist() if r["held_out"]}
        assert again == {s for s in held if int(s[1:]) % 2}  # whatever else there is


def test_each_kind_has_sources_held_out(tmp_path: Path) -> None:
    built = samples_of(tmp_path, [*(clip(k) for k in range(30)), *(image(k) for k in range(30, 60))])
    held = built.table.filter(built.table["held_out"])
    assert sorted(held["kind"].to_pylist()) == ["image", "video"]
    none = samples_of(tmp_path, [clip(k) for k in range(30)], data={"held_out_share": 0})
    assert not any(none.table["held_out"].to_pylist())


def test_manifests_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a, b = (
        write(tmp_path / "a", [clip(0)]),
        write(tmp_path / "b", [clip(1)], backends={"caption": {"captioner": "qwen2_5_vl-7b"}}),
    )
    with pytest.raises(UserError, match=r"mixed.*backends\.caption\.captioner is 'attributes-1' in .*a and 'qwen2_5_vl-7b'"):
        build_samples([a, b], make_recipe())
    c = write(tmp_path / "c", [clip(1)], passes={"scores": "bb"})
    with pytest.raises(UserError, match=r"passes\.scores is 'aa' in .*curate both with one configuration"):
        build_samples([a, c], make_recipe())


def refused(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    """The one line with which it is refused."""
    with pytest.raises(UserError) as error:
        samples_of(folder, rows, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_trained_on_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest given: .*tiers/480p"):
        build_samples([], make_recipe())
    with pytest.raises(UserError, match=r"run curation/run_funnel\.py"):
        build_samples([str(tmp_path / "nowhere")], make_recipe())
    write(tmp_path / "out" / "tiers" / "480p", [clip(0)])
    with pytest.raises(UserError, match=r"name the tier in it, .*out/tiers/480p"):
        build_samples([str(tmp_path / "out")], make_recipe())
    other = write(tmp_path / "other", [clip(0)], tier="192p")
    with pytest.raises(UserError, match="holds the tier '192p', but stage 't2v_480p' trains on '480p'"):
        build_samples([other], make_recipe())
    assert "tier '480p' in" in refused(tmp_path / "e", []) and "loosen its gates" in refused(tmp_path / "e", [])
    short = [clip(k, duration_s=1.0) for k in range(2)]
    assert "can use no video clip: 2 too_short (see data.seconds)" in refused(tmp_path / "s", short)
    assert "has none: curate some" in refused(tmp_path / "i", [image(0)])
    assert "min_short_side_px" in refused(tmp_path / "m", [clip(0)], min_short_side_px=2000)
    assert "sampling_weight" in refused(tmp_path / "w", [clip(0, sampling_weight=None)])
    assert "has no column 'training_captoin'" in refused(tmp_path / "c", [clip(0)], data={"captions": {"training_captoin": 1}})
