"""Names of classes and files as they can be shown: a file system allows line breaks, control characters and bytes that are no text."""

from __future__ import annotations


def printable(name: str) -> str:
    r"""The name with everything that is not printed as itself written as an escape.

    Example:
        >>> printable("white cat"), printable("a\nb\udcff")
        ('white cat', 'a\\nb\\udcff')
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)
