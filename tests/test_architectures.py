"""Architectures of every kind, packed against alone in every call style; the table in docs/ against what runs."""

import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from tiny_models import one_thread  # noqa: F401  (autouse)

from benchmarks.architectures import FAMILIES, HOW, STYLES, examine, reason, verdict

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
# One of each way to be isolated and of each position scheme, mask and layer that needs one.
KINDS = {
    "causal": {
        "spans": "llama gemma3_text gemma4_text gpt_oss gpt2 opt llama4_text phi3 deepseek_v3 qwen2_moe gptj",
        "by sequence": "mamba mamba2 bamba jamba falcon_h1 nemotron_h lfm2 lfm2_moe qwen3_next qwen3_5_text "
        "recurrent_gemma zamba2 zaya kimi_linear olmo_hybrid granitemoehybrid falcon_mamba",
        "rows": "falcon bloom mpt minimax gpt_neo bart xglm deepseek_v32 deepseek_v4 mllama inkling_text",
    },
    "masked": {"spans": "bert roberta modernbert", "by sequence": "fnet", "rows": "esm mobilebert xlm longformer"},
    "sequence": {"spans": "bert llama", "by sequence": "jamba fnet", "rows": "falcon deberta xlnet"},
    "token": {"rows": "bros umt5"},
    "vision-language": {"spans": "gemma3 llava mistral4 paligemma qwen2_vl", "rows": "git"},
}
REFUSED = [("masked", "bart"), ("sequence", "t5"), ("vision-language", "pi0"), ("causal", "blt")]
CASES = [(f, how, name) for f, kinds in KINDS.items() for how, names in kinds.items() for name in names.split()]
# Of each family and way the first; of decoders also what positions, masks and mixers differ in most.
SHORT = {key[:2]: key for key in reversed(CASES)}.values()
SHORT = {*SHORT, *(("causal", how, name) for how, name in [("spans", "gemma3_text"), ("by sequence", "lfm2")])}


def written():
    """The rows of the table: (family, name) -> (outcome, how or why)."""
    rows = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `"):
            name, family, outcome, why = (cell.strip() for cell in line.strip("|").split("|"))
            assert (family, name.strip("`")) not in rows, line
            rows[family, name.strip("`")] = outcome, why
    return rows


def same_version():
    version = re.search(r"transformers ([\d.]+\d) registers", TABLE.read_text())[1]
    if version != transformers.__version__:
        pytest.skip(f"the table is of transformers {version}, this is {transformers.__version__}")


@pytest.mark.parametrize(
    ("family", "how", "name"),
    [pytest.param(*key, id=f"{key[0]}-{key[2]}", marks=[pytest.mark.slow] * (key not in SHORT)) for key in CASES],
)
def test_law_1_packed_equals_alone_in_every_call_style(family, how, name):
    if name not in FAMILIES[family][1]:
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    entry = examine(family, name, STYLES)
    assert verdict(entry) == "exact", entry
    assert entry["how"] == how, entry


def test_the_table_says_what_was_found_here():
    same_version()
    rows = written()
    assert {(f, n): rows[f, n] for f, _, n in CASES} == {(f, n): ("exact", how) for f, how, n in CASES}


@pytest.mark.parametrize(
    ("family", "name"), [REFUSED[0], *(pytest.param(*key, marks=pytest.mark.slow) for key in REFUSED[1:])]
)
def test_law_3_what_is_refused_is_in_the_table_with_its_reason(family, name):
    same_version()
    entry = examine(family, name, ("default",))
    assert verdict(entry) == "refused"
    outcome, why = written()[family, name]
    assert outcome == "refused"
    assert why.removesuffix("...") in " ".join(reason(entry).replace("|", "/").split())


def test_the_table_holds_all_that_transformers_registers_and_counts_it():
    same_version()
    rows = written()
    assert rows.keys() == {(family, name) for family, (_, names) in FAMILIES.items() for name in names}
    assert {outcome for outcome, _ in rows.values()} <= {"exact", "refused", "not run"}
    assert not [key for key, (outcome, why) in rows.items() if (outcome == "exact") != (why in HOW)]
    for family in FAMILIES:
        counts = Counter(rows[key][0] for key in rows if key[0] == family)
        hows = Counter(rows[key][1] for key in rows if key[0] == family)
        cells = [counts["exact"], *(hows[how] for how in HOW), counts["refused"], counts["not run"], 0]
        assert f"| {family} | {' | '.join(map(str, cells))} |" in TABLE.read_text()
    assert sum(family == "causal" and outcome == "exact" for (family, _), (outcome, _) in rows.items()) >= 110
