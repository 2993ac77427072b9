"""Conditions on the values of a forward's inputs: where they are looked at, and what their errors say."""

import ast
from pathlib import Path

import pytest
import torch
from tiny_models import make, packed_row
from transformers import CONFIG_MAPPING, Qwen2VLForConditionalGeneration

import packattn
from packattn.hf import conditions
from packattn.hf.conditions import LONGEST_MESSAGE, ON_THE_DEVICE, Conditions
from packattn.hf.tiny import shrink

PACKAGE = Path(packattn.__file__).parent


def texts(node):
    """What a string of the source may become; what is formatted in counts as 30 characters."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "x" * 30 for part in node.values)]
    return []


def messages():
    """(place, message) of every condition in the package, given where it is required or named `message`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("require", "_assert_async"):
                parts = node.args[1:]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "message":
                parts = [node.value]
            else:
                continue
            for part in parts:
                yield from ((f"{path.name}:{node.lineno}", text) for text in texts(part))


def test_cuda_takes_every_message():
    found = dict(messages())
    assert any("attention_mask has a hole" in text for text in found.values())
    assert any("labels have the last token" in text for text in found.values())
    assert {place: len(text) for place, text in found.items() if len(text) > LONGEST_MESSAGE} == {}
    assert len(ON_THE_DEVICE) <= LONGEST_MESSAGE


@pytest.fixture
def device(monkeypatch):
    """Inputs whose values the host may read in a first forward only, as on a GPU; the assertions made there."""
    seen = []
    monkeypatch.setattr(conditions, "_readable", lambda x, first: first)
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message="": seen.append((bool(condition), message)))
    return seen


def across(batch):
    return batch | {"labels": batch["input_ids"].clone()}


def test_law_3_the_first_forward_says_which_condition_is_broken(device):
    model, batch = make("llama"), packed_row("llama", [5, 3])
    with packattn.patch(model):
        device.clear()
        for _ in range(2):  # a forward that raised is none
            with pytest.raises(ValueError, match="predict the first of the next one"):
                model(**across(batch))
        assert device == []


def test_law_4_later_forwards_look_at_all_conditions_at_once_and_on_the_device(device):
    model, batch = make("llama"), packed_row("llama", [5, 3])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with packattn.patch(model):
        model(**batch)
        device.clear()
        model(**batch, seq_idx=torch.tensor([[0] * 5 + [1] * 3]))
        conditions_of_inputs = [found for found in device if found[1] == ON_THE_DEVICE]
        assert conditions_of_inputs == [(True, ON_THE_DEVICE)]
        assert all(holds for holds, _ in device)
        device.clear()
        model(**across(batch))
    assert (False, ON_THE_DEVICE) in device


def test_every_condition_that_holds_raises_nothing_and_is_looked_at_once():
    held = Conditions()
    held.require(torch.tensor([True, True]), "one")
    held.enforce()
    held.enforce()
    held.require(torch.tensor([True, False]), "two")
    held.require(torch.tensor(False), "three")
    with pytest.raises(ValueError, match=r"^two$"):
        held.enforce()
    held.enforce()


def test_law_3_text_positions_for_images_raise():
    model = Qwen2VLForConditionalGeneration(shrink(CONFIG_MAPPING["qwen2_vl"])).eval()
    batch = packed_row("llama", [5, 3])
    with (
        packattn.patch(model),
        pytest.raises(ValueError, match="tokens of pixel_values positions of text"),
    ):
        model(**batch, pixel_values=torch.zeros(4, 8), image_grid_thw=torch.tensor([[1, 2, 2]]))
