"""The ops, one line each."""


def names() -> tuple[str, ...]:
    """The stems of all ops."""
    from importlib.resources import files

    return tuple(
        sorted(entry.name for entry in files(__name__).iterdir() if entry.is_dir() and not entry.name.startswith("_"))
    )
