"""The error that is the user's to mend, and the warning."""

import reprlib
import sys

_LONGEST = 4096  # characters, as of the longest path on Linux


class UserError(Exception):
    """Bad input; the message names the file, the entry or the flag. Programs print it without a traceback."""


class SharedError(UserError):
    """An error that every process raises, of which the main one tells."""


def warn(message: str) -> None:
    """Tells of something in the data that is not as the user may think, on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def printable(text: object) -> str:
    """The text on one line, for a message: characters that steer a terminal, or that no stream takes, are escaped."""
    written = str(text)
    written = written if len(written) <= _LONGEST else f"{written[:_LONGEST]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in written)


def shown(value: object) -> str:
    """What a file holds in place of what it should, on one short line, whatever it is."""
    try:
        return printable(reprlib.repr(value))[:80]
    except Exception:  # a number too long to be written, an object that cannot say what it is
        return f"a {type(value).__name__}"
