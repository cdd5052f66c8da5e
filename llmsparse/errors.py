"""The errors that reach a user."""


class UserError(ValueError):
    """What was asked, what was found and what to do, in one message; the command line prints it without a traceback."""


class SolverError(UserError):
    """A layer that cannot be solved from its statistics."""
