"""What trainers do with a patched model beside calling it: boundaries in every batch, checkpoints, generation."""

import pytest
import torch
import transformers
from tiny_models import assert_close
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from packattn.hf.tiny import shrink

EXAMPLES = [{"input_ids": list(range(5, 5 + n))} for n in (5, 9, 3)]


def tiny(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[name]))


@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES[:1]], ids=["packed", "one sequence"])
@pytest.mark.parametrize("given", ["return_flash_attn_kwargs", "return_seq_idx"])
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "bamba", "granitemoehybrid"])
def test_law_1_a_hybrid_takes_given_sequences_in_rows_of_any_number(name, given, examples):
    model, batch = tiny(name).eval(), packattn.PackingCollator(**{given: True})(examples)
    expected = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits for e in examples], 1)
    with packattn.patch(model):
        assert_close(model(**batch).logits, expected)
