"""Test that docs/policies.md agrees with the source, and that the source has all required facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_transition.policies import catalog, describe

PAGE = Path(__file__).parents[1] / "docs/policies.md"


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == describe.page(), "run `make policies-doc`"


@pytest.mark.parametrize("kind", catalog.kinds())
def test_every_policy_says_what_it_costs_and_what_its_hyper_parameters_mean(kind):
    found = catalog.describe(kind)
    assert "\n\nCost: " in found.doc
    assert kind in ("full", "random", "quantized") or "Source: " in found.doc
    assert all(field.meaning for field in found.fields.values())
    own = catalog.own_fields(kind)
    for name, field in found.fields.items():
        heading = kind if name in own else "Options of score policies"
        section = describe.page().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name}` |"))
        assert field.meaning in row
