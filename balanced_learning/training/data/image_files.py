"""Image files that a command line names: found in folders and by patterns, and read ahead."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import escape, glob, has_magic
from pathlib import Path

from PIL import Image

from balanced_learning.training.data.images import load_image
from balanced_learning.training.errors import UserError, printable, warn

SUFFIXES = {  # of what is taken for an image in a folder
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
READERS, READ_AHEAD = 2, 4  # threads, images


class ImageFiles:
    """The images of files, upright and in order, decoded ahead by threads; an error in place of one that cannot be."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Image.Image | UserError]:
        with ThreadPoolExecutor(READERS) as pool:
            waiting = deque(pool.submit(_read, file) for file in self.files[:READ_AHEAD])
            for file in self.files[READ_AHEAD:]:
                yield waiting.popleft().result()
                waiting.append(pool.submit(_read, file))
            while waiting:
                yield waiting.popleft().result()


def _read(file: Path) -> Image.Image | UserError:
    try:
        return load_image(file)
    except UserError as error:
        return error


def find_images(names: Sequence[str], output_dir: Path) -> list[Path]:
    """Finds the image files that are meant by names of files and folders, and by patterns.

    A file that is named itself is taken whatever its suffix. Folders are searched with all folders in them, and what is
    hidden is passed over. ``output_dir`` in one of them is no input: it holds the pictures of an earlier run.

    Returns:
        Each file once, in the order of the names.

    Raises:
        UserError: for a name that leads to no image.
    """
    found: dict[str, Path] = {}
    for name in names:
        if os.path.lexists(name) and not os.path.isdir(name):
            images = [Path(name)]
        else:
            images = _images_among(_candidates(name, output_dir), name)
        for image in images:
            found.setdefault(os.path.abspath(image), image)
    return list(found.values())


def _candidates(name: str, output_dir: Path) -> list[Path]:
    """The files in a folder or of a pattern, whatever they hold. What exists of a pattern's path is no pattern."""
    root, pattern = Path(name), ""
    while not os.path.lexists(root):
        root, pattern = root.parent, os.path.join(root.name, pattern)
    if pattern and not has_magic(pattern):
        raise UserError(f"{printable(name)}: no such file or folder")
    matches = (
        sorted(glob(os.path.join(escape(str(root)), pattern.rstrip(os.sep)), recursive=True)) if pattern else [name]
    )
    if not matches:
        raise UserError(f"{printable(name)}: no such file, and as a pattern it matches none")
    files = [Path(file) for match in matches for file in (_walk(match) if os.path.isdir(match) else [match])]
    output = output_dir.resolve()
    if root.resolve() in output.parents:
        files = [file for file in files if output not in file.resolve().parents]
    return list(dict.fromkeys(files))


def _walk(folder: str) -> Iterator[str]:
    seen = set()
    for place, folders, files in os.walk(folder, onerror=_tell, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(place, name) for name in sorted(files) if not name.startswith("."))


def _tell(error: OSError) -> None:
    warn(f"{printable(error.filename)}: cannot be read ({error.strerror}), and is left out")


def _images_among(files: list[Path], name: str) -> list[Path]:
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if not images:
        raise UserError(f"{printable(name)}: no image among its {len(files)} files")
    if others:
        first = printable(others[0])
        warn(f"{printable(name)}: {len(others)} of {len(files)} files are no images and left out, such as {first}")
    return images


def picture_files(files: Sequence[Path], output_dir: Path) -> list[Path]:
    """Chooses where the pictures of images go: no two to one place, and none in the place of an image.

    They have the names of the images, in folders like those below the folder that all images have in common. Pictures
    of files that are neither JPEG nor PNG end in ``.png`` as well.

    Raises:
        UserError: if a picture would replace an image.
    """
    places = [os.path.abspath(file) for file in files]
    common = os.path.commonpath([os.path.dirname(place) for place in places])
    taken: set[str] = set()
    pictures = []
    for place in places:
        name = os.path.relpath(place, common)
        if not name.lower().endswith((".jpg", ".jpeg", ".png")):
            name += ".png"
        while name.casefold() in taken:
            name += ".png"
        taken.add(name.casefold())
        pictures.append(output_dir / name)
    images = {os.path.realpath(place) for place in places}
    replaced = next((picture for picture in pictures if os.path.realpath(picture) in images), None)
    if replaced:
        raise UserError(f"--output-dir {output_dir}: a picture would replace the image {printable(replaced)}")
    return pictures
