"""Image files as people have them: checked without decoding, and loaded the way that their annotations see them.

A camera held sideways stores the pixels as its sensor has them, and in EXIF how to turn them. Tools for labelling show
such an image upright, most of them, and write boxes and size of what they show; some write those of the stored pixels.
The size in the annotations tells them apart, unless it is the same both ways (upside down, mirrored, square, or left
out): then the annotations mean the upright image.
"""

import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from balanced_learning.training.errors import UserError, printable

Size = tuple[int, int]
StatedSize = tuple[int | None, int | None]

# What turns the stored pixels of an EXIF orientation upright, and what turns them back.
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_BACK = {**_UPRIGHT, 6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}
_SWAP_SIDES = (5, 6, 7, 8)

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}  # all others are devices
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_PNG_TAIL = 1 << 17  # bytes; more than EXIF may have


def load_image(path: str | Path, size: Size | None = None) -> Image.Image:
    """Decodes an image, as RGB of 8 bits a channel.

    Transparency is dropped, as torchvision's ``CocoDetection`` drops it; of an animation the first frame is taken.
    The limit of pixels is Pillow's: twice ``PIL.Image.MAX_IMAGE_PIXELS``, which is the user's to raise.

    Args:
        path: the file.
        size: width and height in its annotations. Where they are those of the stored pixels and not of the upright
            image, the pixels come as stored; otherwise the image comes upright, as its EXIF orientation has it.

    Raises:
        UserError: for a file that cannot be decoded, or whose size is another. The message names it.
    """
    with _opened(path) as file:
        orientation = _orientation(file)
        stored, upright = _sizes(file, orientation)
        wants_upright = _means_upright(size or upright, stored, upright)
        if wants_upright is None:
            difference = _difference(size or upright, stored, upright, orientation)
            raise UserError(f"{printable(path)} is now {difference}; it has changed since it was checked")
        image = file.convert("RGBA") if file.mode == "P" else file  # Pillow warns of transparency in a palette
        image = image.convert("RGB")
        is_upright = isinstance(file, TiffImagePlugin.TiffImageFile)  # which Pillow turns by itself
        if orientation in _UPRIGHT and wants_upright != is_upright:
            image = image.transpose((_BACK if is_upright else _UPRIGHT)[orientation])
    image.info.clear()  # nobody is to turn it again
    return image


def check_file(path: str | Path, stated: StatedSize = (None, None)) -> tuple[Size, None] | tuple[None, str]:
    """Checks an image file by its header and its last bytes. Only a file that seems cut off is decoded, to make sure.

    May run in several threads.

    Args:
        path: the file.
        stated: width and height in its annotations; either may be ``None``.

    Returns:
        The width and height that the annotations mean, and ``None``; or ``None`` and the fault, which names the file.
    """
    try:
        with _opened(path) as file:
            is_complete = _is_complete(file)
            orientation = _orientation(file)
            stored, upright = _sizes(file, orientation)
        if not is_complete:
            load_image(path)
    except UserError as error:
        return None, str(error)
    means_upright = _means_upright(stated, stored, upright)
    if means_upright is None:
        return None, f"{printable(path)} is {_difference(stated, stored, upright, orientation)}"
    return (upright if means_upright else stored), None


@contextmanager
def _opened(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """Opens an image file; whatever fails until it is closed is a ``UserError`` with its name."""
    name = printable(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # others might never be opened, or never end
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
            raise UserError(f"{name} is a {kind}, not an image file")
        if not status.st_size:
            raise UserError(f"{name} is empty")
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise UserError(f"{name} has more than 8 bits a channel (mode {file.mode}); convert it")
            if file.format == "EPS" or isinstance(file, ImageFile.StubImageFile):
                raise UserError(f"{name} holds no pixels, but {file.format}, which another program would have to draw")
            if min(file.size) < 1:
                raise UserError(f"{name} has no pixels: it is {file.size[0]} x {file.size[1]}")
            yield file
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} is missing") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is unreadable (Pillow knows no such format)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{name} has more pixels than Pillow takes for safe; cut it into tiles, or set PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except Exception as error:  # a broken file raises whatever its decoder stumbles over
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{name} is unreadable ({printable(reason)})") from None


def _orientation(file: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8. Broken EXIF tells none."""
    with suppress(Exception):
        if file.format == "PNG" and "exif" not in file.info:
            file.info["exif"] = _exif_behind_pixels(file)
        # That of PngImageFile would decode the image.
        orientation = Image.Image.getexif(file).get(ExifTags.Base.Orientation)
        if orientation in _UPRIGHT:
            return int(orientation)
    return 1


def _exif_behind_pixels(file: ImageFile.ImageFile) -> bytes | None:
    """The EXIF of a PNG that has it behind its pixels."""
    tail = _tail(file, _PNG_TAIL)
    for place in (match.start() for match in re.finditer(b"eXIf", tail)):
        end = place + 4 + int.from_bytes(tail[max(0, place - 4) : place], "big")
        if zlib.crc32(tail[place:end]).to_bytes(4, "big") == tail[end : end + 4]:  # no accident
            return b"Exif\0\0" + tail[place + 4 : end]
    return None


def _is_complete(file: ImageFile.ImageFile) -> bool:
    """Whether the file ends as its format does, as far as it is known how."""
    end = _ENDS.get(file.format or "", b"")
    return not end or _tail(file, 4096).rstrip(b"\0").endswith(end)


def _tail(file: ImageFile.ImageFile, count: int) -> bytes:
    stream = file.fp
    if stream is None:
        return b""
    place = stream.tell()
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - count))
    tail = stream.read(count)
    stream.seek(place)
    return tail


def _sizes(file: ImageFile.ImageFile, orientation: int) -> tuple[Size, Size]:
    """The size of the stored pixels, and that of the upright image."""
    width, height = file.size
    if isinstance(file, TiffImagePlugin.TiffImageFile):  # whose size may be either, by the version of Pillow
        width, height = file.tag_v2[TiffImagePlugin.IMAGEWIDTH], file.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return (width, height), (height, width) if orientation in _SWAP_SIDES else (width, height)


def _means_upright(stated: StatedSize, stored: Size, upright: Size) -> bool | None:
    """Whether annotations of the stated size mean the upright image or the stored pixels; ``None``: neither."""
    for answer, size in ((True, upright), (False, stored)):
        if all(side is None or side == own for side, own in zip(stated, size, strict=True)):
            return answer
    return None


def _difference(stated: StatedSize, stored: Size, upright: Size, orientation: int) -> str:
    turned = f" ({stored[0]} x {stored[1]} before its EXIF orientation {orientation})" if stored != upright else ""
    width, height = ("any" if side is None else side for side in stated)
    return f"{upright[0]} x {upright[1]}{turned}, not {width} x {height}"
