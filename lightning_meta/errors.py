"""The error that tells a user what to change."""


class InputError(ValueError):
    """Something the user gave (a file, a path, a value) cannot be used.

    The message is one line: what is wrong, then what to do. The command line prints it without a traceback and exits
    with code 1; library code may catch it as a ``ValueError``. Line ends and control characters, which names in an
    archive may have, are shown as blanks and escapes.
    """

    def __init__(self, message: str):
        shown = (c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(shown))
