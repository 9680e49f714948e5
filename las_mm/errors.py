"""What goes wrong by a user's hand."""


class UserError(Exception):
    """Something the user can mend; its message is one sentence for a terminal."""
