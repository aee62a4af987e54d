"""Images of all EXIF orientations, against Pillow's own turning and against a drawing, and files that are no images."""

import io
import os
import re
import signal
import socket
import struct
import tempfile
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageOps

from balanced_learning.training.data.images import check_file, load_image
from balanced_learning.training.errors import UserError

Image.init()
SIZE = (64, 48)
FORMATS = {
    "jpg": {"quality": 95},
    "mpo": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", SIZE)]},
    "png": {},
    "webp": {"lossless": True},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    **({"avif": {"quality": 95}} if "AVIF" in Image.SAVE else {}),
}

# Where the standard has the first pixel of the first row, and the last one of that row, once the image is upright.
CORNERS = {
    1: ("top left", "top right"),
    2: ("top right", "top left"),
    3: ("bottom right", "bottom left"),
    4: ("bottom left", "bottom right"),
    5: ("top left", "bottom left"),
    6: ("top right", "bottom right"),
    7: ("bottom right", "top right"),
    8: ("bottom left", "top left"),
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def drawing():
    """Its first row begins red and ends green."""
    image = Image.new("RGB", SIZE, "navy")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 15, 15), fill="red")
    draw.rectangle((48, 0, 63, 15), fill="lime")
    return image


def save(path, orientation, image=None, **options):
    (image or drawing()).save(path, exif=exif(orientation), **FORMATS[path.name.split(".", 1)[1]] | options)
    return path


def colour_at(image, corner):
    x = 6 if "left" in corner else image.width - 7
    y = 6 if "top" in corner else image.height - 7
    return ["red", "lime", "navy"][int(np.argmax(image.getpixel((x, y))))]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", CORNERS)
def test_an_image_is_upright_as_the_standard_and_pillow_have_it(tmp_path, orientation, suffix):
    path = save(tmp_path / f"1.{suffix}", orientation)
    upright_size = SIZE if orientation < 5 else SIZE[::-1]
    first, last = CORNERS[orientation]
    for image in (load_image(path), load_image(str(path), upright_size)):
        assert (image.mode, image.size) == ("RGB", upright_size)
        assert colour_at(image, first) == "red"
        assert colour_at(image, last) == "lime"
        with Image.open(path) as file:
            assert np.array_equal(image, ImageOps.exif_transpose(file).convert("RGB"))
    assert check_file(path) == check_file(path, upright_size) == (upright_size, None)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", CORNERS)
def test_annotations_of_the_stored_size_get_the_stored_pixels_where_that_is_another_size(tmp_path, orientation, suffix):
    path = save(tmp_path / f"1.{suffix}", orientation)
    image = load_image(path, SIZE)
    assert image.size == SIZE
    assert check_file(path, SIZE) == (SIZE, None)
    first, last = CORNERS[orientation] if orientation < 5 else ("top left", "top right")
    assert (colour_at(image, first), colour_at(image, last)) == ("red", "lime")


@pytest.mark.parametrize("suffix", ["jpg", "png", "lzw.tif"])
@pytest.mark.parametrize("orientation", [2, 5, 6])
def test_a_square_is_upright(tmp_path, orientation, suffix):
    path = save(tmp_path / f"1.{suffix}", orientation, drawing().crop((0, 0, 64, 64)))
    assert colour_at(load_image(path, (64, 64)), CORNERS[orientation][0]) == "red"


@pytest.mark.parametrize(("stated", "size"), [((None, 64), SIZE[::-1]), ((64, None), SIZE), ((None, None), SIZE[::-1])])
def test_one_side_may_tell_alone(tmp_path, stated, size):
    assert check_file(save(tmp_path / "1.jpg", 6), stated) == (size, None)


def test_nobody_turns_an_image_again(tmp_path):
    for path in (save(tmp_path / f"1.{suffix}", 6) for suffix in FORMATS):
        image = load_image(path)
        assert np.array_equal(image, ImageOps.exif_transpose(image))
        image.save(tmp_path / "copy.png")
        assert np.array_equal(image, load_image(tmp_path / "copy.png"))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("later", [b"", chunk(b"tEXt", b"Comment\0eXIf"), chunk(b"tEXt", b"Comment\0" + 60000 * b"x")])
def test_a_png_may_have_its_exif_behind_its_pixels(tmp_path, later):
    drawing().save(tmp_path / "1.png")
    content = (tmp_path / "1.png").read_bytes()
    late = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")) + later
    (tmp_path / "1.png").write_bytes(content[:-12] + late + content[-12:])
    image = load_image(tmp_path / "1.png")
    with Image.open(tmp_path / "1.png") as file:
        assert np.array_equal(image, ImageOps.exif_transpose(file))
    assert image.size == SIZE[::-1]
    assert check_file(tmp_path / "1.png") == (SIZE[::-1], None)
    assert load_image(tmp_path / "1.png", SIZE).size == SIZE


@pytest.mark.parametrize("data", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", 60 * b"Exif\0"])
@pytest.mark.filterwarnings("ignore")
def test_broken_exif_turns_nothing(tmp_path, data):
    for name in ("1.jpg", "1.png", "1.webp"):
        drawing().save(tmp_path / name, exif=data)
        assert check_file(tmp_path / name, SIZE) == (SIZE, None)
        assert colour_at(load_image(tmp_path / name, SIZE), "top left") == "red"


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, value):
    assert colour_at(load_image(save(tmp_path / "1.jpg", value)), "top left") == "red"


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg")],
)
def test_every_mode_is_rgb(tmp_path, mode, suffix):
    Image.new("RGB", SIZE, "white").convert(mode).save(tmp_path / f"1.{suffix}")
    assert check_file(tmp_path / f"1.{suffix}", SIZE) == (SIZE, None)
    image = load_image(tmp_path / f"1.{suffix}", SIZE)
    assert (image.mode, image.getpixel((9, 9))) == ("RGB", (255, 255, 255))


def test_transparency_is_dropped_without_a_word(tmp_path):
    Image.new("RGBA", SIZE, (200, 30, 40, 0)).save(tmp_path / "1.png")
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([0, 0, 0, 200, 30, 40])
    palette.save(tmp_path / "2.png", transparency=b"\xff\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("1.png", "2.png"):
            assert load_image(tmp_path / name).getpixel((9, 9)) == (200, 30, 40)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", SIZE, colour) for colour in ("white", "black")]
    for name in ("1.gif", "1.webp", "1.png", "1.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert check_file(tmp_path / name, SIZE) == (SIZE, None)
        assert load_image(tmp_path / name, SIZE).getpixel((9, 9)) == (255, 255, 255)


def png(width=64, height=48, depth=8, colour=2, data=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(format, **options):
    stream = io.BytesIO()
    drawing().save(stream, format, **options)
    return stream.getvalue()


def write(content):
    return lambda path: path.write_bytes(content)


def make_socket(path):
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


HEADER_FAULTS = {
    "is missing": lambda path: None,
    "is a folder, not an image file": Path.mkdir,
    "is a pipe, not an image file": os.mkfifo,
    "is a socket, not an image file": make_socket,
    "is a device, not an image file": lambda path: path.symlink_to(os.devnull),
    "is missing ": lambda path: path.symlink_to("nowhere"),
    "symbolic links": lambda path: path.symlink_to(path.name),
    "is empty": write(b""),
    r"is unreadable \(Pillow knows no such format\)": write(b"not an image"),
    "Pillow knows no such format ": write(b"GIF89a"),
    "is unreadable": write(png()[:20]),
    "has more than 8 bits a channel": lambda path: Image.new("I;16", SIZE).save(path),
    r"more than 8 bits a channel \(mode F\)": lambda path: Image.new("F", SIZE).save(path, "TIFF"),
    "holds no pixels, but EPS": lambda path: drawing().save(path, "EPS"),
    "no pixels: it is 0 x 48|is unreadable": write(png(width=0)),
    "has more pixels than Pillow takes for safe": write(png(width=20000, height=20000)),
    "(?i:decompressed data too large)": write(
        png()[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 27))) + png()[33:]
    ),
    "is 64 x 48, not 48 x 64": write(encoded("PNG")),
    r"is 48 x 64 \(64 x 48 before its EXIF orientation 8\), not 48 x 63": write(encoded("JPEG", exif=exif(8))),
}
PIXEL_FAULTS = {
    "cut off JPEG": write(encoded("JPEG")[:-300]),
    "cut off PNG": write(encoded("PNG")[:-40]),
    "cut off GIF": write(encoded("GIF")[:-30]),
    "cut off, and filled with zeros": write(encoded("PNG")[:-100] + bytes(4096)),
}
MET_LATER = {
    "broken pixels": write(png(data=b"no deflate stream")),
    "too few pixels": write(png(data=zlib.compress(bytes(99)))),
    "cut off TIFF": lambda path: path.write_bytes(encoded("TIFF")[:-3000]),
}
STATED = {
    "is 64 x 48, not 48 x 64": (48, 64),
    r"is 48 x 64 \(64 x 48 before its EXIF orientation 8\), not 48 x 63": (48, 63),
}


@pytest.fixture
def deadline():
    """Fails the test if it is still waiting after a minute."""

    def fail(*_):
        pytest.fail("waits without end")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_file_that_is_no_image_is_named(tmp_path, fault):
    path = tmp_path / "1.png"
    HEADER_FAULTS[fault](path)
    stated = STATED.get(fault, (None, None))
    size, message = check_file(path, stated)
    assert size is None
    assert re.search(f"{path} .*{fault.strip()}", message)
    with pytest.raises(UserError) as caught:
        load_image(path, STATED.get(fault))
    now = f"{message.replace(' is ', ' is now ', 1)}; it has changed since it was checked"
    assert str(caught.value) == (now if fault in STATED else message)


@pytest.mark.parametrize("fault", PIXEL_FAULTS | MET_LATER)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, fault):
    path = tmp_path / "1.png"
    (PIXEL_FAULTS | MET_LATER)[fault](path)
    with pytest.raises(UserError, match=f"^{path} is unreadable"):
        load_image(path, SIZE)
    size, message = check_file(path, SIZE)
    if fault in PIXEL_FAULTS:
        assert (size, message.startswith(f"{path} is unreadable")) == (None, True)
    else:
        assert (size, message) == (SIZE, None)


def test_what_stands_behind_an_image_is_not_part_of_it(tmp_path):
    for format in ("JPEG", "PNG", "GIF"):
        (tmp_path / format).write_bytes(encoded(format) + b"and more")
        assert check_file(tmp_path / format, SIZE) == (SIZE, None)
        assert load_image(tmp_path / format).size == SIZE


@pytest.mark.parametrize("name", ["a\0b.png", 300 * "x" + ".png", "\ud800.png", "C:\\a|b?.png", "a\nb\x1b[31m.png"])
def test_a_name_that_no_file_has_is_said_on_one_line(tmp_path, name):
    _, message = check_file(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_image(f"{tmp_path}/{name}")
    assert str(caught.value) == message
    assert message.isprintable()
    message.encode()


def test_the_limit_of_pixels_is_pillows_own(tmp_path, monkeypatch):
    path = save(tmp_path / "1.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    assert "more pixels than Pillow takes for safe" in check_file(path)[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check_file(path) == (SIZE, None)
        warnings.simplefilter("error")
        assert "more pixels than Pillow takes for safe" in check_file(path)[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == SIZE


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "I/O error"), "I/O error"),
        (OSError("-2"), "-2"),
        (MemoryError(), "MemoryError"),
        (struct.error("no bytes"), "no bytes"),
        (EOFError(), "EOFError"),
        (SyntaxError("a\nb"), r"a\\nb"),
    ],
)
def test_whatever_a_decoder_raises_is_said_of_the_file(tmp_path, monkeypatch, error, reason):
    def load(*_):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UserError, match=rf"1\.png is unreadable \({reason}\)"):
        load_image(save(tmp_path / "1.png", 1))


SAMPLES = [encoded(format, exif=exif(6)) for format in ("JPEG", "PNG", "WEBP", "TIFF")] + [
    encoded("GIF"),
    encoded("BMP"),
]


@pytest.mark.usefixtures("deadline")
@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(0, 4000) | st.none(),
)
def test_a_spoilt_image_is_an_image_or_a_user_error(content, changes, length):
    spoilt = bytearray(content)
    for place, value in changes:
        spoilt[place % len(spoilt)] = value
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        suppress(UserError),
    ):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
        path = Path(folder, "image")
        path.write_bytes(spoilt[:length])
        size, fault = check_file(path)
        assert (size is None) == (fault is not None)
        assert load_image(path, size).size == size
