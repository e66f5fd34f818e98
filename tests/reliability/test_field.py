"""Every field case comes out as it should."""

import pytest

from reliability.case import Case
from reliability.field import all_cases, run


def test_cases_have_names_of_their_own() -> None:
    names = [case.case for case in all_cases()]
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("default")  # a user's run shows warnings and goes on
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.case)
def test_the_outcome_is_right(case: Case) -> None:
    outcome = run(case)
    assert outcome.ok, outcome.words
