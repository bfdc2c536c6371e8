"""Docstrings for the site: MkDocs loads this file as a hook, and griffe, which reads the sources, as an extension."""

from __future__ import annotations

import re
from typing import Any

import griffe

# :func:`gclkern.cloud_sizes`, as Markdown has rendered it
ROLE = re.compile(r":(?:class|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Cross-references in Sphinx's notation become links."""
    return ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)


class Doctests(griffe.Extension):
    """A section `Example:` is shown as code. Griffe knows it as `Examples:` and takes the singular for a note."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
