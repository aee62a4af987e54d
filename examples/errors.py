"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Bad input, told in one line that names the file, the entry or the flag."""
