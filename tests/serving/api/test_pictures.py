"""Given frames: what is taken comes out plain, and no bytes whatever break the server."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from serving.api.body import parse_json, parse_multipart
from serving.api.errors import ApiError
from serving.api.pictures import decode_base64, to_png
from tests.serving.api.conftest import picture


def _plain(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(to_png(data, "first_frame", max_bytes=10**7, max_px=10**7)))
    image.load()
    assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
    return image


@pytest.mark.parametrize(
    "data",
    [
        picture(),
        picture(mode="P"),
        picture(mode="RGBA"),
        picture(kind="JPEG", quality=95),
        picture(kind="JPEG", quality=95, progressive=True),
        picture(kind="JPEG", quality=95, mode="CMYK"),
        picture(kind="JPEG", quality=95, restart_marker_blocks=1),
        picture(kind="WEBP", lossless=True),
        picture(kind="WEBP", quality=95),
        picture(kind="WEBP", mode="RGBA", lossless=True),
    ],
    ids=["png", "palette", "alpha", "jpeg", "progressive", "cmyk", "restarts", "webp lossless", "webp", "webp alpha"],
)
def test_still_pictures_of_all_usual_kinds_are_taken(data: bytes) -> None:
    image = _plain(data)
    assert image.size == (64, 48)
    for x, wanted in ((8, (220, 30, 30)), (56, (30, 30, 220))):
        found = image.getpixel((x, 24))
        assert isinstance(found, tuple) and max(abs(a - b) for a, b in zip(found, wanted)) < 12


def test_grey_of_sixteen_bits_keeps_its_steps() -> None:
    file = io.BytesIO()
    deep = Image.new("I;16", (32, 32), 32896)
    deep.save(file, "PNG")
    assert _plain(file.getvalue()).getpixel((3, 3)) == (128, 128, 128)


def test_a_picture_is_turned_upright_and_loses_its_notes() -> None:
    image = Image.open(io.BytesIO(picture()))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    exif[0x010E] = "the place where I live"
    for kind in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        image.save(file, kind, exif=exif, icc_profile=profile, **({"quality": 95} if kind == "JPEG" else {"lossless": True}))
        made = to_png(file.getvalue(), "first_frame", max_bytes=10**7, max_px=10**7)
        upright = _plain(file.getvalue())
        top, bottom = upright.getpixel((24, 8)), upright.getpixel((24, 56))
        assert upright.size == (48, 64) and b"place" not in made
        assert isinstance(top, tuple) and isinstance(bottom, tuple) and top[0] > 200 and bottom[2] > 200


def test_what_is_transparent_is_white() -> None:
    file = io.BytesIO()
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.save(file, "PNG")
    assert _plain(file.getvalue()).getpixel((5, 5)) == (255, 255, 255)
    palette, keyed = Image.new("P", (32, 32), 1), io.BytesIO()
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(keyed, "PNG", transparency=1)
    assert _plain(keyed.getvalue()).getpixel((5, 5)) == (255, 255, 255)


def test_harmless_notes_are_no_reason_to_refuse() -> None:
    info = PngInfo()
    info.add_text("Comment", "a disc <b>moving</b>")
    info.add_itxt("XML:com.adobe.xmp", '<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"/>')
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG", pnginfo=info)
    assert _plain(file.getvalue()).size == (32, 32)


def test_caps_count_bytes_and_pixels() -> None:
    with pytest.raises(ApiError, match=r"0\.001 MB") as large:
        to_png(bytes(1001), "last_frame", max_bytes=1000, max_px=10**7)
    assert (large.value.status, large.value.param) == (413, "last_frame")
    with pytest.raises(ApiError, match="at most 3071 pixels") as many:
        to_png(picture(), "first_frame", max_bytes=10**7, max_px=64 * 48 - 1)
    assert many.value.code == "image_too_large"
    with pytest.raises(ApiError) as long:
        decode_base64("A" * 2000, "first_frame", 1000)
    assert long.value.status == 413


SEEDS = [
    picture(),
    picture(kind="JPEG"),
    picture(kind="WEBP"),
    picture(kind="WEBP", mode="RGBA", lossless=True),
    picture(mode="P"),
]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=6)), max_size=4), st.integers(0, 40))
def test_damaged_pictures_are_decoded_or_refused_and_nothing_else(data: bytes, edits: list[tuple[int, bytes]], cut: int) -> None:
    damaged = bytearray(data)
    for at, new in edits:
        damaged[at % len(damaged) : at % len(damaged) + len(new)] = new
    try:
        made = to_png(bytes(damaged[: len(damaged) - cut]), "first_frame", max_bytes=10**6, max_px=10**5)
    except ApiError as error:
        assert error.status == 400
    else:
        assert Image.open(io.BytesIO(made)).format == "PNG"


@given(st.binary(max_size=200) | st.from_regex(rb'\{"[a-z"\\u0-9:,\[\]{}NaInfty.eE+-]{0,60}\}', fullmatch=True))
def test_any_bytes_are_an_object_or_a_422(data: bytes) -> None:
    try:
        assert isinstance(parse_json(data), dict)
    except ApiError as error:
        assert error.status == 422


_PART = st.sampled_from(
    [b"--b", b"--b--", b"\r\n", b"Content-Disposition: form-data; ", b'name="a"', b"; filename=x", b"\r\n\r\n", b"x"]
)


@given(st.lists(_PART | st.binary(max_size=8), max_size=25).map(b"".join))
def test_any_form_is_parsed_or_a_422(data: bytes) -> None:
    try:
        fields = parse_multipart(data, b"b")
    except ApiError as error:
        assert error.status == 422
    else:
        assert all(isinstance(v, str) for v in fields.values.values())
        assert all(isinstance(v, bytes) for v in fields.files.values())
