"""Printable names of classes and files: file names may contain line breaks, control characters and bytes that are not text."""

from __future__ import annotations


def printable(name: str) -> str:
    r"""The name with non-printable characters escaped.

    Example:
        >>> printable("white cat"), printable("a\nb\udcff")
        ('white cat', 'a\\nb\\udcff')
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)
