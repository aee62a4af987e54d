"""Image files under the names that exporters write: with backslashes, percent-encoded, or with folders of elsewhere."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from balanced_learning.training.errors import UserError, printable, warn


def find_file(folder: str | Path, file_name: str) -> str | None:
    r"""Returns the name, relative to a folder, under which the file of an annotation is there.

    That is the name as written, with either slash. Otherwise it is the longest end of its path that is a file in the
    folder, with either slash, percent-encoded or not, and of a URL also what its query holds: of ``C:\data\a b.png``,
    ``http://host/images/a%20b.png?x=1`` and ``/data/local-files/?d=images%5Ca%20b.png`` it may be ``a b.png``. Only a
    name as written may lead out of the folder.

    Returns:
        ``None`` if there is no such file.
    """
    for name in (file_name, file_name.replace("\\", "/")):
        if os.path.exists(os.path.join(folder, name)):
            return name
    return next((name for name in _ends(file_name) if os.path.isfile(os.path.join(folder, name))), None)


def tell_found(json_file: Path, written: Sequence[str], found: Sequence[str]) -> None:
    """Warns of the files that were found under other names than written, in one line on stderr.

    Args:
        json_file: where the names were written.
        written: the names of all images.
        found: what :func:`find_file` returned for them.

    Raises:
        UserError: if files of different folders were found as one.
    """
    others = [names for names in zip(written, found, strict=True) if names[0] != names[1]]
    if not others:
        return
    names_of: dict[str, str] = {}
    for name, file in zip(written, found, strict=True):
        first = names_of.setdefault(file, name)
        if first.replace("\\", "/") != name.replace("\\", "/"):
            raise UserError(
                f"{json_file}: file names {printable(first)} and {printable(name)} both lead to {printable(file)}, the "
                "only file like them"
            )
    name, file = map(printable, others[0])
    warn(
        f"{json_file}: {len(others)} of {len(written)} images were found under other names than written, the "
        f"first as {file} for {name}"
    )


def _ends(file_name: str) -> list[str]:
    """The ends of a path as written and decoded, longest first."""
    before, _, query = file_name.partition("?")
    texts = [file_name, before, *(value for _, value in parse_qsl(query))]
    texts += [unquote(text, errors="surrogateescape") for text in texts]
    texts += [text.replace("\\", "/") for text in texts]
    texts += [unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD")]  # macOS writes the latter
    ends = set()
    for text in dict.fromkeys(texts):
        parts = [part for part in text.split("/") if part not in ("", ".")]
        inside = parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
        ends |= {"/".join(inside[start:]) for start in range(len(inside))}
    return sorted(ends, key=lambda end: (-end.count("/"), end))
