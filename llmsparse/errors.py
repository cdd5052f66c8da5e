"""The errors that reach a user."""


class UserError(ValueError):
    """What was asked, what was found and what to do, in one message; shown without a traceback."""


class SolverError(UserError):
    """A layer that cannot be solved from its statistics."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
