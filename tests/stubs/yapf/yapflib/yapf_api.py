"""The text as it is."""


def FormatCode(text: str, **_: object) -> tuple[str, bool]:  # noqa: N802 - yapf's name
    return text, True
