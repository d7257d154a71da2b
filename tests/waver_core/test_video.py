"""Probe, decode and write: every frame at its time and the right way up, and every bad file refused with its reason."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import weakref
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waver_core.errors import MediaError
from waver_core.storage import remove, write_atomic
from waver_core.synthetic.writing import without_index
from waver_core.video import (
    Limits,
    decode,
    display_size_px,
    is_image,
    open_video,
    probe,
    quarter_turns,
    read_image,
    resize,
    to_rgb,
    write_mp4,
    write_png,
)

FPS = 24


def number(frame: np.ndarray) -> int:
    """Which counted frame this is, read from its grey middle."""
    height, width = frame.shape[:2]
    middle = frame[height // 3 : height * 2 // 3, width // 3 : width * 2 // 3]
    return round((float(middle.mean()) - 40) / 4)


def numbers(frames: np.ndarray) -> list[int]:
    return [number(f) for f in frames]


def corner_colours(frame: np.ndarray) -> list[str]:
    """Names of the corners' colours: top left, top right, bottom left, bottom right."""
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    c = 6
    cells = frame[:c, :c], frame[:c, -c:], frame[-c:, :c], frame[-c:, -c:]
    return [names.get(tuple((cell.mean(axis=(0, 1)) > 128).astype(int)), "?") for cell in cells]


def reason_of(use: Callable[[], object]) -> str:
    with pytest.raises(MediaError) as caught:
        use()
    text = str(caught.value)
    assert text and "\n" not in text
    return caught.value.reason


def all_frames(uri: str) -> list[tuple[float, int, bool]]:
    """(time, number, damaged) of every frame that decodes."""
    with open_video(uri) as video:
        return [(f.time_s, number(to_rgb(f.picture)), f.damaged) for f in video.frames()]


# --- probe and decode --------------------------------------------------------------------------------------------------


def test_probe_reads_the_headers(counted_mp4: str) -> None:
    info = probe(counted_mp4)
    assert (info.codec, info.width_px, info.height_px, info.fps, info.pixel_aspect) == ("h264", 96, 64, 24.0, 1.0)
    assert info.duration_s == pytest.approx(2.0)
    assert (info.has_audio, info.n_video_streams, info.start_s) == (False, 1, 0.0)
    assert info.pixel_format == "yuv420p" and "mp4" in info.container


def test_decode_gives_every_frame_in_order_and_upright(counted_mp4: str) -> None:
    frames = decode(counted_mp4)
    assert frames.shape == (48, 64, 96, 3) and frames.dtype == np.uint8
    assert numbers(frames) == list(range(48))
    assert corner_colours(frames[20]) == ["red", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [
        (0.0, 0.5, range(12)),
        (0.5, 1.0, range(12, 24)),
        (0.51, 0.99, range(13, 24)),
        (13 / 24, 14 / 24, range(13, 14)),
        (1.75, None, range(42, 48)),
        (1.9, 9.0, range(46, 48)),
    ],
)
def test_decode_of_a_span_gives_the_frames_in_it(counted_mp4: str, start_s: float, end_s: float | None, expected: range) -> None:
    assert numbers(decode(counted_mp4, start_s=start_s, end_s=end_s)) == list(expected)


@given(first=st.integers(0, 46), n=st.integers(1, 47))
@settings(max_examples=25)
def test_any_span_of_whole_frames_is_exact(counted_mp4: str, first: int, n: int) -> None:
    last = min(48, first + n)
    assert numbers(decode(counted_mp4, start_s=first / FPS, end_s=last / FPS)) == list(range(first, last))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, list(range(48))),
        (12, list(range(0, 48, 2))),
        (8, list(range(0, 48, 3))),
        (2, [0, 12, 24, 36]),
        (48, sorted([*range(48), *range(48)])),
    ],
)
def test_decode_at_a_rate_takes_the_frame_at_each_tick(counted_mp4: str, fps: float, expected: list[int]) -> None:
    assert numbers(decode(counted_mp4, end_s=2.0, fps=fps)) == expected


def test_decode_at_a_rate_within_a_span(counted_mp4: str) -> None:
    assert numbers(decode(counted_mp4, start_s=0.5, end_s=1.5, fps=6)) == [12, 16, 20, 24, 28, 32]


@pytest.mark.parametrize(("short_side_px", "shape"), [(32, (32, 48)), (48, (48, 72)), (64, (64, 96)), (500, (64, 96))])
def test_decode_shrinks_to_the_short_side_and_never_enlarges(
    counted_mp4: str, short_side_px: int, shape: tuple[int, int]
) -> None:
    assert decode(counted_mp4, end_s=0.1, short_side_px=short_side_px).shape[1:3] == shape


def test_a_span_without_frames_is_no_frames(counted_mp4: str) -> None:
    assert reason_of(lambda: decode(counted_mp4, start_s=5.0, end_s=6.0)) == "no_frames"


@pytest.mark.parametrize("time_s", [0.0, 0.2, 0.5, 0.74, 1.3, 1.99])
def test_after_skip_to_the_frames_are_those_of_a_full_decode(counted_mp4: str, time_s: float) -> None:
    full = {round(t, 4): n for t, n, _ in all_frames(counted_mp4)}
    with open_video(counted_mp4) as video:
        video.skip_to(time_s)
        after = [(f.time_s, number(to_rgb(f.picture)), f.damaged) for f in video.frames()]
    assert after[0][0] <= time_s + 1e-6 and after[-1][1] == 47
    assert time_s - after[0][0] < 12 / FPS + 1e-6  # the key frame before, not the start of the file
    assert all(full[round(t, 4)] == n and not damaged for t, n, damaged in after)


def test_key_frame_times_come_from_the_index(counted_mp4: str) -> None:
    with open_video(counted_mp4) as video:
        assert video.key_frame_times() == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_bytes_read_is_the_size_of_the_packets(counted_mp4: str) -> None:
    with av.open(counted_mp4) as container:
        expected = sum(p.size for p in container.demux(video=0))
    with open_video(counted_mp4) as video:
        assert sum(1 for _ in video.frames()) == 48
        assert video.bytes_read == expected and video.n_bad_packets == 0


def test_files_on_other_file_systems_are_read_the_same(counted_mp4: str) -> None:
    write_atomic("memory://test-video/a.mp4", Path(counted_mp4).read_bytes())
    assert numbers(decode("memory://test-video/a.mp4", start_s=0.5, end_s=1.0)) == list(range(12, 24))
    remove("memory://test-video", recursive=True)
    assert reason_of(lambda: probe("memory://test-video/a.mp4")) == "unreadable"


# --- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_delayed_start_counts_from_the_first_frame(
    tmp_path: Path, make_video: Callable, make_frame: Callable, container: str
) -> None:
    frames = [make_frame(k) for k in range(36)]
    options = {"g": "12", "bf": "0"}
    uri = make_video(tmp_path / "late", frames, pts=range(48, 84), options=options, container=container)
    assert probe(uri).start_s == pytest.approx(2.0, abs=0.002)
    read = all_frames(uri)
    assert [t for t, _, _ in read] == pytest.approx([k / FPS for k in range(36)], abs=0.002)
    assert [n for _, n, _ in read] == list(range(36))
    assert numbers(decode(uri, start_s=1.0, end_s=1.25)) == list(range(24, 30))
    with open_video(uri) as video:
        if container == "mp4":  # Matroska reads its index at the first seek
            assert video.key_frame_times() == pytest.approx([0.0, 0.5, 1.0], abs=0.002)
        video.skip_to(1.1)
        assert next(video.frames()).time_s == pytest.approx(1.0, abs=0.002)


VARIABLE_PTS = [0, 1, 2, 3, 9, 10, 11, 20, 21, 30, 31, 32]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_at_uneven_times_keep_them(tmp_path: Path, make_video: Callable, make_frame: Callable, container: str) -> None:
    frames = [make_frame(k) for k in range(len(VARIABLE_PTS))]
    uri = make_video(tmp_path / "uneven", frames, pts=VARIABLE_PTS, options={"bf": "0"}, container=container)
    read = all_frames(uri)
    assert [t for t, _, _ in read] == pytest.approx([p / FPS for p in VARIABLE_PTS], abs=0.002)
    assert [n for _, n, _ in read] == list(range(len(VARIABLE_PTS)))
    assert numbers(decode(uri, start_s=6 / FPS, end_s=25 / FPS)) == [4, 5, 6, 7, 8]


def test_decode_at_a_rate_repeats_the_frame_before_each_tick_of_an_uneven_source(
    tmp_path: Path, make_video: Callable, make_frame: Callable
) -> None:
    frames = [make_frame(k) for k in range(len(VARIABLE_PTS))]
    uri = make_video(tmp_path / "uneven.mp4", frames, pts=VARIABLE_PTS, options={"bf": "0"})
    # ticks at pts 0, 6, 12, 18, 24, 30: the frames there are those with pts 0, 3, 11, 11, 21, 30
    assert numbers(decode(uri, end_s=36 / FPS, fps=4)) == [0, 3, 6, 6, 8, 9]


def test_frames_in_presentation_order_with_b_frames(tmp_path: Path, make_video: Callable, make_frame: Callable) -> None:
    uri = make_video(tmp_path / "b.mp4", [make_frame(k) for k in range(30)], options={"bf": "3", "g": "30", "preset": "medium"})
    read = all_frames(uri)
    assert [n for _, n, _ in read] == list(range(30))
    assert [t for t, _, _ in read] == pytest.approx([k / FPS for k in range(30)])
    with open_video(uri, skip_nonref=True) as video:
        assert 0 < sum(1 for _ in video.frames()) < 30


# --- shape of the picture ----------------------------------------------------------------------------------------------

# ISO 14496-12 tkhd matrices (a, b, c, d): a point goes to (a x + c y, b x + d y), y down.
MATRICES = {"clockwise": (0, 1, -1, 0), "upside_down": (-1, 0, 0, -1), "counter_clockwise": (0, -1, 1, 0), "none": (1, 0, 0, 1)}
UPRIGHT = {
    "none": ["red", "green", "blue", "white"],
    "clockwise": ["blue", "red", "white", "green"],
    "upside_down": ["white", "blue", "green", "red"],
    "counter_clockwise": ["green", "white", "red", "blue"],
}


def turned(source: str, path: Path, matrix: tuple[int, int, int, int]) -> str:
    """A copy whose track header asks players to turn the picture; written by the standard, not by any library."""
    data = bytearray(Path(source).read_bytes())
    at = data.index(b"tkhd") - 4
    assert data[at + 8] == 0  # version 0
    a, b, c, d = (v << 16 for v in matrix)
    data[at + 48 : at + 84] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("turn", MATRICES)
def test_rotated_files_come_out_upright(counted_mp4: str, tmp_path: Path, turn: str) -> None:
    uri = turned(counted_mp4, tmp_path / "turned.mp4", MATRICES[turn])
    frames = decode(uri, end_s=0.25)
    size = (64, 96) if turn in ("none", "upside_down") else (96, 64)
    assert frames.shape[1:3] == size
    assert corner_colours(frames[3]) == UPRIGHT[turn]
    assert numbers(frames) == list(range(6))
    small = decode(uri, end_s=0.1, short_side_px=32)
    assert small.shape[1:3] == (size[0] // 2, size[1] // 2)
    with open_video(uri) as video:
        picture = next(video.frames()).picture
        turns = quarter_turns(picture)
    assert display_size_px(picture.width, picture.height, 1.0, turns) == (size[1], size[0])
    assert np.array_equal(to_rgb(picture, turns=turns), frames[0])


@pytest.mark.parametrize(
    ("aspect", "shape"),
    [(Fraction(2), (64, 192)), (Fraction(4, 3), (64, 128)), (Fraction(1, 2), (64, 48)), (Fraction(1), (64, 96))],
)
def test_pixels_are_made_square(
    tmp_path: Path, make_video: Callable, make_frame: Callable, aspect: Fraction, shape: tuple[int, int]
) -> None:
    uri = make_video(tmp_path / "a.mp4", [make_frame(k) for k in range(4)], pixel_aspect=aspect)
    assert probe(uri).pixel_aspect == pytest.approx(float(aspect), abs=1e-3)
    frames = decode(uri)
    assert frames.shape == (4, *shape, 3)
    assert corner_colours(frames[0]) == ["red", "green", "blue", "white"]


def test_pixel_aspect_and_rotation_together(tmp_path: Path, make_video: Callable, make_frame: Callable) -> None:
    stretched = make_video(tmp_path / "a.mp4", [make_frame(k) for k in range(4)], pixel_aspect=Fraction(2))
    frames = decode(turned(stretched, tmp_path / "b.mp4", MATRICES["clockwise"]), short_side_px=32)
    assert frames.shape[1:3] == (96, 32)
    assert corner_colours(frames[0]) == UPRIGHT["clockwise"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((96, 64, 1.0, 0), (96, 64)),
        ((96, 64, 1.0, 1), (64, 96)),
        ((96, 64, 2.0, 2), (192, 64)),
        ((720, 576, 16 / 15, 3), (576, 768)),
    ],
)
def test_display_size(args: tuple[int, int, float, int], expected: tuple[int, int]) -> None:
    assert display_size_px(*args) == expected


def test_resize_averages_areas_and_knows_grey(make_frame: Callable) -> None:
    checks = np.indices((64, 96)).sum(axis=0) % 2 * 255
    picture = av.VideoFrame.from_ndarray(np.repeat(checks.astype(np.uint8)[..., None], 3, axis=2), format="rgb24")
    small = resize(picture, 24, 16)
    assert small.shape == (16, 24, 3) and np.abs(small.astype(int) - 127).max() <= 2
    assert resize(picture, 24, 16, "gray").shape == (16, 24)


# --- files that cannot be used -----------------------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states a large size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.rate, frame.pts = 44100, k * 1024
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "unreadable"),
        (b"", "not_media"),
        (b"just some text\n" * 60, "not_media"),
        (b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n2\n00:00:03,000 --> 00:00:04,000\nyou\n", "not_media"),
        (bytes(5000), "not_media"),
    ],
)
def test_files_that_are_no_video(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    assert reason_of(lambda: probe(str(path))) == reason
    assert reason_of(lambda: decode(str(path))) == reason


def test_a_folder_is_unreadable(tmp_path: Path) -> None:
    assert reason_of(lambda: probe(str(tmp_path))) == "unreadable"


def test_the_message_is_about_this_file_and_no_other(tmp_path: Path) -> None:
    """libav's last log line may stem from another file; it has no place in a ledger that must not change between runs."""
    (tmp_path / "huge.png").write_bytes(png_that_claims(30000, 30000))
    reason_of(lambda: probe(str(tmp_path / "huge.png")))
    with pytest.raises(MediaError) as caught:
        probe(str(tmp_path / "missing.mp4"))
    assert str(caught.value) == "cannot be opened as a video: No such file or directory"


def test_sound_without_pictures_has_no_video_stream(tmp_path: Path) -> None:
    audio_only(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="has no video stream, only audio") as caught:
        probe(str(tmp_path / "a.mp4"))
    assert caught.value.reason == "no_video_stream"


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.0,\n{name}\n#EXT-X-ENDLIST\n",
    "hls_absolute": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.0,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {name}\n",
    "dash": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{name}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    ),
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_dressed_up_as_a_video_opens_no_other_file(counted_mp4: str, tmp_path: Path, kind: str, suffix: str) -> None:
    other = tmp_path / "other.mp4"
    other.write_bytes(Path(counted_mp4).read_bytes())
    listing = tmp_path / f"listing{suffix}"
    listing.write_text(PLAYLISTS[kind].format(name=other.name, path=other))
    assert reason_of(lambda: probe(str(listing))) == "not_media"


def test_absurd_sizes_and_lengths_are_refused_from_the_header(counted_mp4: str, tmp_path: Path) -> None:
    assert reason_of(lambda: probe(counted_mp4, Limits(max_frame_px=96 * 64 - 1))) == "too_large"
    assert reason_of(lambda: probe(counted_mp4, Limits(max_duration_s=1.9))) == "too_long"
    assert probe(counted_mp4, Limits(96 * 64, 2.1)).width_px == 96
    for width, height, reason in ((12000, 9000, "too_large"), (30000, 30000, "undecodable")):
        (tmp_path / "a.png").write_bytes(png_that_claims(width, height))
        assert reason_of(lambda: read_image(str(tmp_path / "a.png"))) == reason


def test_media_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(MediaError("too_long", "lasts long")))
    assert (error.reason, str(error)) == ("too_long", "lasts long")


# --- damaged files -----------------------------------------------------------------------------------------------------


def test_a_truncated_file_gives_the_frames_it_has(counted_mp4: str, tmp_path: Path) -> None:
    data = Path(counted_mp4).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) * 6 // 10])
    assert probe(str(path)).duration_s == pytest.approx(2.0)
    sound = [(t, n) for t, n, damaged in all_frames(str(path)) if not damaged]
    assert 12 <= len(sound) < 48
    assert [n for _, n in sound] == list(range(len(sound)))


def test_a_file_without_its_index_is_no_media(counted_mp4: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(without_index(Path(counted_mp4).read_bytes()))
    assert reason_of(lambda: probe(str(tmp_path / "a.mp4"))) == "not_media"


@pytest.mark.parametrize("how", ["ones", "flipped", "zeros"])
@pytest.mark.parametrize("hit", [15, 18, 22])
def test_damage_lasts_until_the_next_key_frame(counted_mp4: str, tmp_path: Path, hit: int, how: str) -> None:
    with av.open(counted_mp4) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    packet = packets[hit]
    assert not packet.is_keyframe and packets[12].is_keyframe and packets[24].is_keyframe
    data = bytearray(Path(counted_mp4).read_bytes())
    span = slice(packet.pos, packet.pos + packet.size)
    data[span] = {"ones": b"\xff" * packet.size, "zeros": bytes(packet.size), "flipped": bytes(255 - v for v in data[span])}[how]
    path = tmp_path / "hit.mp4"
    path.write_bytes(data)
    read = all_frames(str(path))
    damaged = [round(t * FPS) for t, _, d in read if d]
    sound = [(round(t * FPS), n) for t, n, d in read if not d]
    assert set(range(hit + 1, 24)) <= set(damaged) <= set(range(hit, 24))
    assert [k for k, _ in sound] == [*range(hit), *range(24, 48)]
    assert all(k == n for k, n in sound)
    with open_video(str(path)) as video:
        assert len(list(video.frames())) == len(read)
        assert video.n_bad_packets == 1 and video.last_error


# --- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tif"])
def test_images_are_read_as_rgb(tmp_path: Path, make_frame: Callable, suffix: str) -> None:
    path = str(tmp_path / f"a{suffix}")
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    cv2.imwrite(path, cv2.cvtColor(make_frame(10), cv2.COLOR_RGB2BGR), options)
    assert is_image(path)
    assert np.array_equal(read_image(path), make_frame(10))


def test_images_are_turned_upright_by_their_exif_tag(tmp_path: Path, make_frame: Callable) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the picture must be turned clockwise
    Image.fromarray(make_frame(10)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    picture = read_image(str(tmp_path / "a.jpg"))
    assert picture.shape == (96, 64, 3)
    assert corner_colours(picture) == UPRIGHT["clockwise"]


@pytest.mark.parametrize(("content", "reason"), [(None, "unreadable"), (b"", "empty"), (b"no picture" * 99, "not_media")])
def test_images_that_cannot_be_read(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    assert reason_of(lambda: read_image(str(path))) == reason


# --- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (96, 64), (63, 64)])
def test_written_files_play_and_odd_sizes_become_even(tmp_path: Path, make_frame: Callable, height: int, width: int) -> None:
    path = str(tmp_path / "a.mp4")
    assert write_mp4(path, (make_frame(k, height, width) for k in range(12)), fps=24) == 12
    frames = decode(path)
    assert frames.shape == (12, height // 2 * 2, width // 2 * 2, 3)
    assert numbers(frames) == list(range(12))
    assert corner_colours(frames[5])[0] == "red"
    data = Path(path).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 29.97, Fraction(25), 12, 23.976, Fraction(24000, 1001), 24.0, 1])
def test_written_files_keep_their_rate(tmp_path: Path, make_frame: Callable, fps: Fraction | float) -> None:
    path = str(tmp_path / "a.mp4")
    write_mp4(path, (make_frame(k) for k in range(24)), fps=fps)
    info = probe(path)
    assert info.fps == pytest.approx(float(fps), rel=1e-4)
    assert info.duration_s == pytest.approx(24 / float(fps), rel=1e-3)
    assert [t for t, _, _ in all_frames(path)] == pytest.approx([k / float(fps) for k in range(24)], abs=1e-3)


@pytest.mark.parametrize("n_before", [0, 2, 100])
def test_nothing_is_left_when_the_frames_break_off(tmp_path: Path, n_before: int) -> None:
    rng = np.random.default_rng(0)

    def frames() -> object:
        for _ in range(n_before):
            yield rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_mp4(str(tmp_path / "a.mp4"), frames(), fps=24)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_frames_are_taken_from_a_generator_one_at_a_time(tmp_path: Path) -> None:
    """The encoder keeps its own few pictures; no array that it was given stays."""
    given_: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for k in range(120):
            frame = np.full((64, 96, 3), k, np.uint8)
            given_.append(weakref.ref(frame))
            alive.append(sum(ref() is not None for ref in given_))
            yield frame

    assert write_mp4(str(tmp_path / "a.mp4"), frames(), fps=24) == 120
    assert max(alive) <= 2


# --- what a file says of itself ----------------------------------------------------------------------------------------

KNOWN = {
    "title": "A red disc — 赤い円",
    "comment": 'Generated. {"seed": 7, "prompt": "é"}',
    "description": "Two\nlines\tand a tab",
    "artist": "OpenWaver",
    "copyright": "none",
}


def tags(path: str) -> dict[str, str]:
    """What ffprobe's library reads of a container."""
    with av.open(path) as container:
        return dict(container.metadata)


def few_frames(make_frame: Callable) -> list[np.ndarray]:
    return [make_frame(k) for k in range(6)]


@pytest.mark.parametrize("more", [{}, {"waver_seed": "7", "openwaver": "x" * 9000}])
def test_metadata_of_an_mp4_can_be_read_and_the_bytes_are_the_same_again(
    tmp_path: Path, make_frame: Callable, more: dict[str, str]
) -> None:
    first, again, plain = (str(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4"))
    for path in (first, again):
        write_mp4(path, few_frames(make_frame), fps=24, metadata={**KNOWN, **more})
    write_mp4(plain, few_frames(make_frame), fps=24)
    found = tags(first)
    assert {key: found[key] for key in (*KNOWN, *more)} == {**KNOWN, **more}
    data = Path(first).read_bytes()
    assert data == Path(again).read_bytes() != Path(plain).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and "creation_time" not in found
    assert np.array_equal(decode(first), decode(plain))


def test_well_known_keys_are_written_as_players_read_them(tmp_path: Path, make_frame: Callable) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(str(path), few_frames(make_frame), fps=24, metadata={**KNOWN, "software": "OpenWaver 1"})
    data = path.read_bytes()
    assert all(atom in data for atom in (b"mdirappl", b"\xa9nam", b"\xa9cmt", b"\xa9ART", b"\xa9too", b"desc", b"cprt"))
    assert tags(str(path))["encoder"] == "OpenWaver 1"


def test_ffprobe_reads_all_keys(tmp_path: Path, make_frame: Callable) -> None:
    path, given_ = str(tmp_path / "a.mp4"), {**KNOWN, "waver_seed": "7"}
    write_mp4(path, few_frames(make_frame), fps=24, metadata=given_)
    try:
        done = subprocess.run(
            ["ffprobe", "-v", "error", "-show_format", "-of", "json", path], capture_output=True, check=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("no ffprobe on this machine")
    found = json.loads(done.stdout)["format"]["tags"]
    assert {key: found[key] for key in given_} == given_


WRECKED = {"title": "cut\x00short", "comment": "half \ud83d of a pair", "description": "", "waver_x": "bell\x07 next\x85 end"}
MENDED = {"title": "cut short", "comment": "half ? of a pair", "waver_x": "bell  next  end"}


def test_metadata_that_no_container_holds_is_mended(tmp_path: Path, make_frame: Callable) -> None:
    write_mp4(str(tmp_path / "a.mp4"), few_frames(make_frame), fps=24, metadata=WRECKED)
    found = tags(str(tmp_path / "a.mp4"))
    assert {key: found.get(key) for key in WRECKED} == {**MENDED, "description": None}
    write_png(str(tmp_path / "a.png"), make_frame(1), WRECKED)
    titled = {"Title": MENDED["title"], "Comment": MENDED["comment"], "waver_x": MENDED["waver_x"]}
    assert png_texts(tmp_path / "a.png") == titled


def png_texts(path: Path) -> dict[str, str]:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        return dict(picture.text)  # type: ignore[attr-defined]


def test_a_png_holds_its_pixels_and_its_metadata_and_has_the_same_bytes_again(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (35, 53, 3)).astype(np.uint8)
    given_ = {**KNOWN, "software": "OpenWaver 1", "waver_seed": "7"}
    for name in ("a.png", "b.png"):
        write_png(str(tmp_path / name), frame, given_)
    write_png(str(tmp_path / "plain.png"), frame)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes() and sorted(p.name for p in tmp_path.iterdir())[0] == "a.png"
    assert np.array_equal(read_image(str(tmp_path / "a.png")), frame)
    assert png_texts(tmp_path / "a.png") == {
        **{key.capitalize(): KNOWN[key] for key in ("title", "comment", "description", "copyright")},
        "Author": "OpenWaver",
        "Software": "OpenWaver 1",
        "waver_seed": "7",
    }
    assert b"iTXtTitle" in data and b"tEXtwaver_seed" in data and data.index(b"tEXt") < data.index(b"IDAT")
    assert png_texts(tmp_path / "plain.png") == {}
