"""What must hold: packed equals alone, and no example sees another."""

from dataclasses import dataclass

import torch

import packattn
from benchmarks.demo.acts import Act
from benchmarks.demo.approaches import APPROACHES, UNPATCHED, Approach, Examples, pack
from benchmarks.demo.training import device_and_precision, isolation, to
from packattn.hf.verify import VerifyReport

# Two sums of the same float32 terms in another order differ by a few roundings of the result.
_ROUNDINGS = 64
# Examples of a leak probe: few, since it takes two forwards for each approach.
_PROBED = 4


@dataclass
class Checks:
    """The figures that decide whether the demo passes.

    Attributes:
        leaks: by approach, the largest change of a logit of one example when the tokens of another change.
        loss_packed, loss_alone: of the same mini-batch in float32, patched and packed against plain and one by one.
        verify: packattn.verify's report on the patched model.
    """

    leaks: dict[str, float]
    loss_packed: float
    loss_alone: float
    verify: VerifyReport

    @property
    def allowed(self) -> float:
        """How far the two losses may be apart."""
        return _ROUNDINGS * torch.finfo(torch.float32).eps * self.loss_alone

    def failures(self) -> list[str]:
        """What does not hold, in words."""
        found = [
            f"{approach.name} leaks {self.leaks[approach.name]:.2e} from one example into another"
            for approach in APPROACHES
            if approach.patched and self.leaks[approach.name] != 0
        ]
        # A probe that does not see the leak of the naive packing sees nothing.
        found += [
            f"the leak probe found nothing in {approach.name}"
            for approach in APPROACHES
            if approach.offline and not approach.patched and self.leaks[approach.name] == 0
        ]
        if not abs(self.loss_packed - self.loss_alone) <= self.allowed:
            found.append(
                f"the packed loss {self.loss_packed:.7f} is not the loss alone {self.loss_alone:.7f} "
                f"(allowed difference {self.allowed:.1e})"
            )
        if not self.verify.ok:
            found.append("packattn.verify is not satisfied")
        return found


def check(act: Act) -> Checks:
    """Run the checks on the act's model before any training."""
    device, _ = device_and_precision()
    model = act.model(device)
    model.eval()
    examples = act.data()[0][: act.minibatch]
    shortest = sorted(examples, key=len)[:_PROBED]
    leaks = {approach.name: _leak(model, approach, shortest) for approach in (*APPROACHES, UNPATCHED)}
    with torch.no_grad():
        alone = [(model(**to(pack([ids]), device)).loss.item(), len(ids) - 1) for ids in examples]
        with packattn.patch(model):
            packed = model(**to(pack(examples), device)).loss.item()
    mean = sum(loss * tokens for loss, tokens in alone) / sum(tokens for _, tokens in alone)
    with packattn.patch(model):
        return Checks(leaks, packed, mean, packattn.verify(model))


@torch.no_grad()
def _leak(model: torch.nn.Module, approach: Approach, examples: Examples) -> float:
    """The largest change of a logit of the other examples when all tokens of the first one change."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    other = [(token + 1) % vocabulary for token in examples[0]]
    # Where the first example lies, by the approach's own collation of marked examples; padding is 0.
    marks = approach.collate([[min(index, 1) + 1] * len(ids) for index, ids in enumerate(examples)])["input_ids"]
    with isolation(model, approach):
        before = model(**to(approach.collate(examples), device)).logits
        after = model(**to(approach.collate([other, *examples[1:]]), device)).logits
    return (before - after)[marks == 2].abs().max().item()
