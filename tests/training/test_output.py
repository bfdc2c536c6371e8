"""What is printed reaches any terminal."""

from __future__ import annotations

import io
import sys

import pytest

from gclkern.training.output import echo


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", "\\udcff 猫 é\n"), ("latin-1", "\\udcff \\u732b é\n"), ("ascii", "\\udcff \\u732b \\xe9\n")])
def test_letters_that_an_encoding_lacks_are_escaped(encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    echo("\udcff 猫 é")
    assert written.getvalue() == expected.encode(encoding)
