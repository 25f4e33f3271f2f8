"""The page of the API is made of the docstrings: every public name has one, and pdoc sets them all."""

from __future__ import annotations

import inspect
import re

import pytest

import lfq_lightning as lfq

SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises", "Example": "Example"}


def test_a_public_name_says_what_it_is_and_what_it_takes() -> None:
    for name in lfq.__all__:
        public = getattr(lfq, name)
        text = inspect.cleandoc(public.__doc__ or "")
        assert text.split("\n\n")[0].endswith("."), name
        assert not text.startswith(f"{name}("), f"{name}: a dataclass makes a docstring of its fields"
        told = re.findall(r"^    \**(\w+):", text.partition("\nArgs:\n")[2], re.MULTILINE)
        assert not told or set(told) >= set(inspect.signature(public).parameters), name


def test_pdoc_sets_every_docstring_and_its_sections() -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(docformat="google")
    page = pdoc.render.html_module(pdoc.doc.Module(lfq), {"lfq_lightning": pdoc.doc.Module(lfq)})
    found = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL))
    for name in lfq.__all__:
        docstring = found[name].partition('class="docstring"')[2].partition("<div id=")[0]  # without a class's methods
        assert docstring, name
        for section, heading in SECTIONS.items():
            written = f"\n{section}:\n" in inspect.cleandoc(getattr(lfq, name).__doc__)
            assert written == (f">{heading}:</h6>" in docstring), f"{name}, {section}"
