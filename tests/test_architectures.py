"""Architectures of every kind, packed against alone in every call style; the table in docs/ against what runs."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.architectures import FAMILIES, STYLES, examine, verdict

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
# One of each way to be isolated and of each position scheme, mask and layer that needs one.
KINDS = {
    "causal": {
        "spans": "llama gemma3_text gemma4_text gpt_oss gpt2 opt llama4_text phi3 deepseek_v3 qwen2_moe mistral4 gptj",
        "by sequence": "mamba mamba2 bamba jamba falcon_h1 nemotron_h lfm2 lfm2_moe qwen3_next qwen3_5_text "
        "recurrent_gemma zamba2 zaya kimi_linear olmo_hybrid granitemoehybrid falcon_mamba",
        "rows": "falcon bloom mpt minimax gpt_neo bart xglm deepseek_v32 deepseek_v4 mllama inkling_text",
    },
    "masked": {"spans": "bert roberta modernbert", "by sequence": "fnet", "rows": "esm mobilebert xlm longformer"},
    "encoder": {"by sequence": ""},
    "sequence": {"spans": "bert llama", "by sequence": "jamba", "rows": "falcon"},
    "vision-language": {"spans": "gemma3 llava"},
}
CASES = [(f, how, name) for f, kinds in KINDS.items() for how, names in kinds.items() for name in names.split()]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("family", "how", "name"), CASES, ids=[f"{f}-{n}" for f, _, n in CASES])
def test_law_1_packed_equals_alone_in_every_call_style(family, how, name):
    if name not in FAMILIES[family][1]:
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    entry = examine(family, name, STYLES)
    assert verdict(entry) == "exact", entry
    assert entry["how"] == how, entry


def rows_of_the_table():
    cells = [re.findall(r"[^|]+", line) for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {(c[1].strip(), c[0].strip(" `")): (c[2].strip(), c[3].strip()) for c in cells}


def test_the_table_holds_what_transformers_registers():
    version = re.search(r"transformers (\S+?)[,.]? ", TABLE.read_text())[1]
    if version != transformers.__version__:
        pytest.skip(f"the table is of transformers {version}")
    rows = rows_of_the_table()
    assert rows.keys() <= {(family, name) for family, (_, names) in FAMILIES.items() for name in names}
    assert not [key for key, (outcome, _) in rows.items() if outcome not in ("exact", "refused", "not run")]
    assert sum(family == "causal" and outcome == "exact" for (family, _), (outcome, _) in rows.items()) >= 110
