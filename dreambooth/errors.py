"""Errors that a user can act on: where, which rule, which value, what to do next."""


class UserError(Exception):
    """One clear sentence about an input that cannot be used; shown without a traceback.

    Args:
        where: the config path (`data.subject_dir`) or the file that the user can change.
        rule: what must hold, as a verb phrase: "must be a folder with at least one photo".
        got: the offending value, if there is one; shown after "got".
        next_step: what to type or do next.

    The text reads `<where> <rule>, got <value>; <next step>`.
    """

    def __init__(self, where: str, rule: str, got: object = None, next_step: str = "") -> None:
        sentence = f"{where} {rule}"
        if got is not None:
            sentence += f", got {got!r}" if isinstance(got, str) else f", got {got}"
        super().__init__(f"{sentence}; {next_step}" if next_step else sentence)


class ConfigError(UserError, ValueError):
    """A value in the config that breaks a rule (a ValueError too, so that constructors read as usual)."""
