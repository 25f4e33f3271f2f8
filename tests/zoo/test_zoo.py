"""`pytest -m zoo`: every network of the zoo, with the extra `zoo` installed."""

from __future__ import annotations

import pytest

from tests.zoo.case import Case
from tests.zoo.examine import examine
from tests.zoo.listing import CASES

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(600)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_network_is_quantized_trained_resumed_loaded_compiled_exported_and_left_as_it_was(case: Case) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    result = examine(case)
    assert not result.failed
    assert result.share >= case.share, "\n".join(result.left)
    assert case.share >= 0.99 or case.why
