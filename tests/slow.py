"""Marks the cases that only `make test-all` runs. CONTRIBUTING.md says which those are."""

import pytest


def cases(all_of_them, slow):
    """Parameters of the cases, by their names; those whose name is in `slow`, separated by semicolons, are marked."""
    slow = {name.strip() for name in slow.split(";")} - {""}
    unknown = slow - {case.name for case in all_of_them}
    assert not unknown, f"no case is named {unknown}"
    return [
        pytest.param(case, id=case.name.replace(" ", "-"), marks=[pytest.mark.slow] if case.name in slow else [])
        for case in all_of_them
    ]
