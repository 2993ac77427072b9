"""The resource gate: gate.csv is of this code, keeps every rule, and a sample of it is compiled again."""

import pytest
import triton

from benchmarks import gate
from benchmarks.gate import Row

HASH, VERSION, FIGURES = gate.read()
AGAIN = "run `make gate` (an hour on two cores) and commit benchmarks/gate.csv"

SAMPLE = [
    Row(80, "forward", "bf16", 64, 64, 4, ""),
    Row(80, "dq", "bf16", 128, 128, 4, ""),
    Row(80, "dkdv", "bf16", 64, 64, 4, "softcap"),
    Row(86, "forward", "bf16", 128, 128, 4, ""),
    Row(90, "forward", "bf16", 128, 128, 4, ""),
    Row(90, "dkdv", "bf16", 64, 64, 4, ""),
    Row(100, "forward", "bf16", 64, 64, 4, ""),
    Row(120, "dq", "bf16", 64, 64, 4, ""),
    Row("gfx942", "forward", "bf16", 64, 64, 4, ""),
    Row(80, "delta", "fp32", 64, 64, 4, ""),
]
SLOW = [row for row in SAMPLE if row.head_dim == 128 or row.target == 120 or row[:2] == (90, "dkdv")]


def test_the_gate_was_measured_on_this_code():
    assert gate.code_hash() == HASH, f"the kernels or the launch table changed after the gate was measured: {AGAIN}"


def test_every_row_was_measured():
    assert list(FIGURES) == gate.rows(), AGAIN


def test_no_rule_is_broken():
    problems = [f"{row}: {problem}" for row, figures in FIGURES.items() for problem in gate.broken(row, figures)]
    assert not problems, "\n".join(problems)


def test_allowed_spills_have_a_reason_and_are_used():
    used = {id(gate.allowed(row)) for row, figures in FIGURES.items() if figures["spills"]}
    for entry in gate.ALLOWED:
        assert entry.reason
        assert id(entry) in used, f"nothing needs {entry}"


@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"gate.csv was measured with triton {VERSION}")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id="-".join(str(part) for part in row if part), marks=[pytest.mark.slow] * (row in SLOW))
        for row in SAMPLE
    ],
)
def test_a_sample_compiles_to_what_the_gate_says(row):
    figures = gate.measure(row)
    assert figures == {name: FIGURES[row][name] for name in figures}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": 10**6}, "bytes of shared memory, the device has"),
        ({"blocks": 0}, "no block fits"),
        ({"spills": 4}, "4 bytes of spills a thread, allowed are 0"),
        ({"barriers": 4}, "4 barriers in the main loop"),
        ({"shared_stores": 1}, "1 stores to shared memory"),
    ],
)
def test_a_broken_rule_is_found(change, message):
    row = SAMPLE[0]
    assert gate.broken(row, FIGURES[row]) == []
    (problem,) = gate.broken(row, FIGURES[row] | change)
    assert message in problem


def test_wgmma_is_asked_for_on_sm_90():
    row = SAMPLE[4]
    (problem,) = gate.broken(row, FIGURES[row] | {"wgmma": 0})
    assert problem == "no wgmma in the main loop"
