"""Counts in sentences, so that one is never several: "1 run is", "2 runs are"."""


def counted(count: int, singular: str, many: str | None = None) -> str:
    """Return `1 run`, `2 runs` or `1,200 runs`; `many` is the plural where it is not the singular with an s."""
    return f"{count:,} {singular if count == 1 else many or f'{singular}s'}"


def agreeing(count: int, singular: str, many: str) -> str:
    """Return the verb or the word that goes with a count: `is` or `are`."""
    return singular if count == 1 else many
