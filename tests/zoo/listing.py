"""All networks of the zoo."""

from __future__ import annotations

from tests.zoo import images, language, others
from tests.zoo.case import Case

CASES: list[Case] = [*language.CASES, *images.CASES, *others.CASES]
