"""An index of what was read and checked of a large data set, kept in the cache for later starts to map into memory."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from glob import escape
from pathlib import Path

from balanced_learning.training.data.cache import cache_folder
from balanced_learning.training.data.columns import Columns
from balanced_learning.training.errors import warn
from balanced_learning.training.files import new_folder, reason_of, write_new
from balanced_learning.training.opening import open_file

LARGE = 32 << 20  # bytes of JSON; anything smaller is read and checked anew in seconds
_VERSION = 1


def load_index(
    json_file: Path, image_dir: Path, tell: Callable[[str], None] = warn
) -> tuple[Columns, dict[int, str]] | None:
    """The index of a data set, if there is a whole one of this very JSON. ``tell`` is told of a damaged one."""
    try:
        folder = _folder(json_file, image_dir)
        with open_file(folder / "header.json") as file:
            header = json.loads(file.read())
        if not isinstance(header, dict):
            return None
        is_whole = header.pop("checksum") == _checksum(header)
        if is_whole and header["of"] != _identity(json_file, image_dir):
            return None
        if not is_whole or header["checksums"] != _checksums(folder):
            tell(f"{folder}: the index of {json_file} is damaged; reading anew")
            return None
        categories = {int(category_id): name for category_id, name in header["categories"].items()}
        return Columns.map(folder), categories
    except (OSError, RuntimeError, ValueError, KeyError):  # RuntimeError: there is no home
        return None


def save_index(json_file: Path, image_dir: Path, columns: Columns, categories: dict[int, str]) -> Columns:
    """Writes the index of a data set, and returns its arrays mapped from there.

    Where the cache cannot be written, a warning says so, and the arrays are returned as they are.
    """
    try:
        folder = _folder(json_file, image_dir)
        with new_folder(folder) as unfinished:
            columns.write(unfinished)
            header = {
                "of": _identity(json_file, image_dir),
                "categories": categories,
                "checksums": _checksums(unfinished),
            }
            text = json.dumps(header | {"checksum": _checksum(header)})
            write_new(unfinished / "header.json", lambda file: file.write(text.encode()))
            if folder.exists():
                whole = load_index(json_file, image_dir, tell=lambda _: None)
                if not whole or _checksums(folder) != header["checksums"]:
                    shutil.rmtree(folder)  # damaged, or the images lie elsewhere since
        for older in folder.parent.glob(f"{escape(folder.name[:-9])}-????????"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
        return Columns.map(folder)
    except OSError as error:
        if faster := load_index(json_file, image_dir):  # another process of this run
            return faster[0]
        warn(f"{cache_folder()}: no index kept ({reason_of(error)}); the next start reads all anew")
        return columns


def _folder(json_file: Path, image_dir: Path) -> Path:
    """The place of the index: another one for another content, so that no index is replaced by a later one."""
    path = zlib.crc32(os.fsencode(os.path.realpath(json_file)))
    content = zlib.crc32(json.dumps(_identity(json_file, image_dir)).encode())
    return cache_folder() / f"index-{json_file.stem}-{path:08x}-{content:08x}"


def _identity(json_file: Path, image_dir: Path) -> list:
    """The marks of a data set, to each of which an index belongs."""
    stat = json_file.stat()
    return [_VERSION, os.path.realpath(json_file), os.path.realpath(image_dir), stat.st_size, stat.st_mtime_ns]


def _checksum(header: dict) -> int:
    return zlib.crc32(json.dumps(header).encode())


def _checksums(folder: Path) -> dict[str, int]:
    checksums = {}
    for name in Columns.array_names():
        checksum = 0
        with open_file(folder / f"{name}.npy") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
        checksums[name] = checksum
    return checksums
