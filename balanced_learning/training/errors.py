"""The error that is the user's to mend."""


class UserError(Exception):
    """Bad input; the message names the file, the entry or the flag. Programs print it without a traceback."""


def printable(text: object) -> str:
    """The text on one line, for a message: characters that steer a terminal, or that no stream takes, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
