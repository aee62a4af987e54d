"""Reads the JSON of a COCO data set into arrays, a piece at a time, and checks every field that is used of it.

What is written as COCO writes it takes the fast way, typed decoding by msgspec. A piece with anything else in it takes
the slow way, entry by entry, which knows what other forms mean and can say what is wrong where.
"""

import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from balanced_learning.training.data.columns import Columns, pack
from balanced_learning.training.data.fields import (
    MAX_AREA,
    MAX_PIXELS,
    as_area,
    as_box,
    as_flag,
    as_id,
    as_size,
    as_text,
)
from balanced_learning.training.errors import UserError

PIECE = 1 << 16  # entries
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_COCO = "not a COCO file, which is an object with 'images', 'annotations', 'categories'"


_Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Side = Annotated[int, Meta(gt=0, lt=MAX_PIXELS)]
_Pixels = Annotated[float, Meta(ge=-MAX_PIXELS, le=MAX_PIXELS)]
_Text = Annotated[str, Meta(min_length=1)]


class _Category(Struct):
    id: _Id
    name: _Text


class _Image(Struct, gc=False):
    id: _Id
    file_name: _Text
    width: _Side | None = None
    height: _Side | None = None


class _Annotation(Struct, gc=False):
    image_id: _Id
    category_id: _Id
    bbox: tuple[_Pixels, _Pixels, _Pixels, _Pixels]
    area: Annotated[float, Meta(ge=0, le=MAX_AREA)] | None = None
    iscrowd: Literal[0, 1] | bool | None = 0


class _Content(Struct):
    images: msgspec.Raw
    annotations: msgspec.Raw
    categories: msgspec.Raw


_FIELDS: dict[Any, dict[str, Callable[[Any], Any]]] = {
    _Category: {"id": as_id, "name": as_text},
    _Image: {"id": as_id, "file_name": as_text, "width": as_size, "height": as_size},
    _Annotation: {"image_id": as_id, "category_id": as_id, "bbox": as_box, "area": as_area, "iscrowd": as_flag},
}


def read_json(json_file: Path) -> tuple[Columns, dict[int, str]]:
    """Returns images and boxes, and the name of each category by its id.

    Sizes that the file leaves out are 0, areas those of the boxes. Images are in the order of the file, and so are the
    boxes of each.

    Raises:
        UserError: for a file that is not COCO's JSON, and for the first entry that cannot be used.
    """
    content = _content(json_file)
    categories: dict[int, str] = {}
    for category in _flat(_pieces(content, "categories", _Category, json_file)):
        if category.id in categories:
            raise UserError(f"{json_file}: category {category.id}: the id is used twice")
        categories[category.id] = category.name
    if not categories:
        raise UserError(f"{json_file}: 'categories' is empty")

    images = list(_flat(_pieces(content, "images", _Image, json_file)))
    if not images:
        raise UserError(f"{json_file}: 'images' is empty")
    image_ids = np.array([image.id for image in images], np.int64)
    names, name_ends = pack([image.file_name for image in images])
    widths = np.array([image.width or 0 for image in images], np.int32)
    heights = np.array([image.height or 0 for image in images], np.int32)
    del images
    order = np.argsort(image_ids, kind="stable")
    in_order = image_ids[order]
    if (twice := in_order[1:][in_order[1:] == in_order[:-1]]).size:
        raise UserError(f"{json_file}: image {twice[0]}: the id is used twice")

    columns = _annotation_columns(content, json_file)
    image_of_box = order[_find(in_order, columns, "image_id", "images", json_file)]
    _find(np.array(sorted(categories), np.int64), columns, "category_id", "categories", json_file)
    by_image = np.argsort(image_of_box, kind="stable")
    boxes = columns["bbox"][by_image]
    areas = columns["area"][by_image]
    return Columns(
        image_ids=image_ids,
        widths=widths,
        heights=heights,
        names=names,
        name_ends=name_ends,
        first_boxes=np.concatenate(([0], np.cumsum(np.bincount(image_of_box, minlength=len(image_ids))))),
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2:].clip(min=0).prod(axis=1), areas),
        category_ids=columns["category_id"][by_image],
        crowds=columns["iscrowd"][by_image],
        entries=by_image.astype(np.int32),
    ), categories


def _content(json_file: Path) -> dict[str, Any]:
    """The three lists, not decoded yet; or, where msgspec takes the file for no JSON, what json makes of it."""
    try:
        if not json_file.is_file():
            raise UserError(f"{json_file}: {'not a file' if json_file.exists() else 'no such file'}")
        data: Any = np.memmap(json_file, np.uint8, mode="r") if json_file.stat().st_size else b""
    except OSError as error:
        raise UserError(f"{json_file}: cannot be read ({error.strerror})") from None
    if bytes(data[:3]) == _BYTE_ORDER_MARK:
        data = data[3:]
    try:
        content = msgspec.json.decode(data, type=_Content)
        return {key: getattr(content, key) for key in content.__struct_fields__}
    except _UNDECODABLE:
        pass
    try:
        lenient = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file}: not JSON ({error})") from None
    if not isinstance(lenient, dict):
        raise UserError(f"{json_file}: {_NOT_COCO}")
    return lenient


def _pieces(content: dict[str, Any], key: str, kind: Any, json_file: Path) -> Iterator[list[Any]]:
    """The entries of a list as records of a kind, some at a time."""
    entries = content.pop(key, None)
    if isinstance(entries, msgspec.Raw):
        try:
            entries = msgspec.json.decode(entries, type=list[msgspec.Raw])
        except (msgspec.DecodeError, RecursionError):
            entries = None
    if not isinstance(entries, list):
        raise UserError(f"{json_file}: not a COCO file: it has no list '{key}'")
    decoder = msgspec.json.Decoder(list[kind])
    for start in range(0, len(entries), PIECE):
        piece = entries[start : start + PIECE]
        entries[start : start + PIECE] = [None] * len(piece)  # what has been read need not be kept
        try:
            records = decoder.decode(b"[" + b",".join(piece) + b"]")
        except (*_UNDECODABLE, TypeError):  # TypeError: they are objects already
            records = [_checked(entry, kind, f"{json_file}: {key}[{i}]") for i, entry in enumerate(piece, start)]
        yield records


def _checked(entry: Any, kind: Any, where: str) -> Any:
    if isinstance(entry, msgspec.Raw):
        try:
            entry = json.loads(bytes(entry))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object, got {reprlib.repr(entry)}")
    values = {}
    for name, convert in _FIELDS[kind].items():
        try:
            values[name] = convert(entry.get(name))
        except ValueError as error:
            label = f"{where} (id {reprlib.repr(entry['id'])})" if "id" in entry and name != "id" else where
            raise UserError(f"{label}: '{name}' {error}, got {reprlib.repr(entry.get(name))}") from None
    return kind(**values)


def _annotation_columns(content: dict[str, Any], json_file: Path) -> dict[str, np.ndarray]:
    kinds: dict[str, Any] = {
        "image_id": np.int64, "category_id": np.int64, "bbox": np.float64, "area": np.float64, "iscrowd": bool,
    }  # fmt: skip
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for records in _pieces(content, "annotations", _Annotation, json_file):
        for name, kind in kinds.items():
            pieces[name].append(np.array([getattr(record, name) for record in records], kind))  # None: nan, False
    empty = {name: np.empty((0, 4) if name == "bbox" else 0, kind) for name, kind in kinds.items()}
    return {name: np.concatenate([empty[name], *pieces[name]]) for name in kinds}


def _find(known: np.ndarray, columns: dict[str, np.ndarray], field: str, key: str, json_file: Path) -> np.ndarray:
    """The place of each annotation's image or category in the sorted ids."""
    wanted = columns[field]
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    unknown = np.flatnonzero(known[places] != wanted)
    if unknown.size:
        first = unknown[0]
        raise UserError(f"{json_file}: annotations[{first}]: {field} {wanted[first]} is not among '{key}'")
    return places


def _flat(pieces: Iterator[list[Any]]) -> Iterator[Any]:
    return (record for piece in pieces for record in piece)
