"""The one exception whose text is meant for the user."""


class RamoeError(ValueError):
    """Bad input: the text names the file, line or key, what was found, what was expected, and what to do.

    The command line and the jobs print the text without a traceback and exit with status 2.
    """
