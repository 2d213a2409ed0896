"""How errors are told to a user."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The message of an error on one line, of at most `limit` characters; the error's type where it has none."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if limit is None or len(message) <= limit else message[: limit - 3] + "..."
