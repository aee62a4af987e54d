"""The error that is the user's to mend."""


class UserError(Exception):
    """Bad input; the message names the file, the entry or the flag. Programs print it without a traceback."""
