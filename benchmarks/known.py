"""The classes that packattn knows: every model of transformers and adapter of PEFT proven, and packattn/hf/known.json.

    python -m benchmarks.known [--only llama ...]   prove what the log does not hold yet
    python -m benchmarks.known --write              known.json from the log (out/known.jsonl), which may hold several
                                                    versions of transformers, the newest last

Each class of transformers that takes input_ids is built as a tiny random model, all its weights random. What its parts
are is guessed from names and sources; with this guess for a table it is patched, and everything that it returns of a
packed row, and the gradients, must be what its sequences give alone. Only then its parts are known, as what they were
guessed to be. benchmarks/architectures.py holds the same models to eight call styles.
"""

import argparse
import gc
import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import packattn
from benchmarks.architectures import BESIDE, TOLERANCE, difference, randomize, relative
from packattn.hf import known, tiny
from packattn.hf.known import Part, calls_interface, forward_of, hash_of, inner, name_of, source_of
from packattn.hf.plan import make_plan
from packattn.hf.rope import looks_at_length

LOG = Path("out/known.jsonl")
TABLE = Path("packattn/hf/known.json")
LENGTHS = [7, 19, 7, 1, 6]
SECONDS = 120

# Of torch: what works token by token, over the last dimension; and what keeps only the rows of a batch apart.
_OF_TOKENS = """
    activation: CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish ReLU
        ReLU6 SELU SiLU Sigmoid Softmax Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    container: ModuleDict ModuleList ParameterDict ParameterList Sequential
    dropout: Dropout
    linear: Bilinear Identity Linear
    loss: BCEWithLogitsLoss CrossEntropyLoss KLDivLoss L1Loss MSELoss NLLLoss
    module: _forward_unimplemented
    normalization: LayerNorm RMSNorm
    sparse: Embedding
"""
_OF_ROWS = """
    activation: MultiheadAttention
    conv: Conv1d Conv2d Conv3d ConvTranspose1d
    normalization: GroupNorm
    padding: _ConstantPadNd
    pooling: AdaptiveAvgPool1d AvgPool1d MaxPool1d
    rnn: GRU LSTM RNN
"""
# Wrappers and layers that tests hold to (tests/test_hf_integrations.py, tests/test_hf_parallel.py), and of bitsandbytes
# the layers that keep weights in four bits and compute with them as they are.
_LIBRARIES = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "tokens",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "tokens",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "tokens",
    "torch._dynamo.eval_frame.OptimizedModule": "tokens",
    "torch.nn.utils.parametrize.ParametrizationList": "beside",
    "deepspeed.runtime.engine.DeepSpeedEngine": "tokens",
    "bitsandbytes.nn.modules.Linear4bit": "tokens",
    "peft.tuners.lora.bnb.Linear4bit": "tokens",
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__.<locals>.cast_forward_to_fp32": "tokens",
    "liger_kernel.transformers.model.llama.lce_forward": "shifts",
    "liger_kernel.transformers.rms_norm.LigerRMSNorm": "tokens",
    "liger_kernel.transformers.swiglu.LigerSwiGLUMLP": "tokens",
}

# What names tell: layers that mix along the row without attention; those of them that look back only, so that padding
# on the right changes nothing; and those that only hold weights or work token by token.
_MIXERS = re.compile(
    r"[Mm]amba|SSM|Ssm|[Rr]wkv|RWKV|[msx]LSTM|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|Recurrent|"
    r"ShortConv|CausalConv|Retention|Hyena|TokenShift|Fourier|N[Gg]ram"
)
_CAUSAL = re.compile(
    r"[Mm]amba|Bamba|FalconH1Mixer|[Rr]wkv|[msx]LSTM|Delta|Lightning|Recurrent|ShortConv|Inkling|Cca|CCA"
)
_NO_MIXERS = re.compile(r"Norm|Cache|MLP|Mlp|Rotary|Router|Experts|DecoderLayer|Output")
_ONE_LOGIT_A_ROW = re.compile(r"(ForSequenceClassification|DPR(Context|Question)Encoder)$")
# Attention to keys that an indexer or a learned mask selects by what the whole row holds.
_SPARSE = {
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "dots3_note", "mistral_large4", "minimax_m3_vl", "doge",
}  # fmt: skip
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "mamba", "mlp", "moe",
    "hybrid", "hybrid_sliding", "recurrent",
}  # fmt: skip


def guess(model: nn.Module, ran: set[int]) -> dict[str, Part]:
    """What the parts of a model seem to be, by their names and sources.

    Args:
        ran: ids of the modules that run on text.
    """
    plan = make_plan(model)
    outermost, innermost = plan.builders[0][1], plan.builders[-1][1]
    inside = {id(m) for m in outermost.modules()}
    kinds: dict[int, str] = {}
    why: dict[str, str] = {}
    covered: set[int] = set()
    for module in innermost.modules():
        name = type(module).__name__
        if id(module) in covered or isinstance(module, (PreTrainedModel, GradientCheckpointingLayer)):
            continue
        if looks_at_length(module):
            continue
        if _mixes(module) and not is_convolution(module):
            kinds[id(module)] = "similar" if _CAUSAL.search(name) else "equal"
            covered |= {id(m) for m in module.modules()}
        elif is_convolution(module):
            why[_key(innermost)] = f"{name} mixes along the row inside of attention"
        elif calls_interface(module):
            kinds[id(module)] = "attends"
        elif name.endswith("Pooler"):
            kinds[id(module)] = "one"
        elif _computes_attention(module, covered):
            why[_key(module)] = "computes attention itself"
    why |= _why_of_builders(plan, innermost)
    parts: dict[str, Part] = {}
    for module in model.modules():
        key, kind = _key(module), kinds.get(id(module), "tokens")
        if not any(id(m) in ran for m in module.modules()) and (kind == "tokens" or why):
            kind = "beside"
        elif id(module) in covered - kinds.keys() or (why and id(module) in inside):
            kind = "rows"
        elif module is plan.entries[0] and _ONE_LOGIT_A_ROW.search(type(module).__name__):
            kind = "sequence"
        elif module is plan.entries[0] and _shifts_labels(module):
            kind = "shifts"
        part = Part(kind, hash_of(forward_of(module)), why.get(key, "") if kind == "rows" else "")
        parts[key] = min(part, parts.get(key, part), key=_rank)
    return parts


def _mixes(module: nn.Module) -> bool:
    name = type(module).__name__
    if calls_interface(module) or _NO_MIXERS.search(name):
        return False
    return bool(_MIXERS.search(name)) or any(is_convolution(child) for child in module.children())


def is_convolution(module: nn.Module) -> bool:
    """Whether a module of torch itself mixes along the row."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size != (1,)
    return isinstance(module, (nn.LSTM, nn.GRU, nn.RNN))


def _computes_attention(module: nn.Module, covered: set[int]) -> bool:
    """Whether a module is attention by its name, holds no other that is, and does not call the interface."""
    others = [m for m in module.modules() if m is not module]
    return (
        bool(re.search(r"Attention(?!.*(Output|Pool|Norm))", type(module).__name__))
        and not any("Attention" in type(m).__name__ or id(m) in covered for m in others)
        and next(module.parameters(), None) is not None
    )


def _why_of_builders(plan: Any, innermost: PreTrainedModel) -> dict[str, str]:
    """Reasons for rows that lie in the models that build masks, by their key."""
    kind, key = innermost.config.model_type, _key(innermost)
    attends = any(calls_interface(m) for m in innermost.modules())
    embeddings = sorted({type(m).__name__ for m in innermost.modules() if _embeds_by_mask(m)})
    if kind in _SPARSE or kind.removesuffix("_text") in _SPARSE:
        return {key: "attends to keys chosen by their content, which is not a span"}
    if layers := sorted(set(getattr(innermost.config, "layer_types", None) or ()) - _LAYER_TYPES):
        return {key: f"has layer types that mix the row in other ways: {', '.join(layers)}"}
    if attends and not any(
        re.fullmatch(r"create_\w*masks?\w*", name) for name in vars(sys.modules[type(innermost).__module__])
    ):
        return {key: "does not build its masks by transformers.masking_utils"}
    if embeddings:
        return {key: f"has positions that depend on the attention_mask of the row ({', '.join(embeddings)})"}
    if attends and "position_ids" not in inspect.signature(innermost.forward).parameters:
        return {key: "takes no position_ids"}
    return {}


def _embeds_by_mask(module: nn.Module) -> bool:
    if not re.search(r"Embeddings?$", type(module).__name__):
        return False
    names = inspect.signature(module.forward).parameters
    # A table of positions that takes them when it is given them, as `Carry` does.
    return "attention_mask" in names and not (isinstance(module, nn.Embedding) and "position_ids" in names)


def _shifts_labels(module: nn.Module) -> bool:
    """Whether the loss of a model is that of causal language models (of the same names, XLNet's is not)."""
    named = re.search(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", type(module).__name__)
    return bool(named) and "loss_function" in source_of(module)


def _key(module: nn.Module) -> str:
    return name_of(inner(type(module).forward))


_KINDS = ("sequence", "shifts", "similar", "equal", "one", "attends", "tokens", "rows", "beside")


def _rank(part: Part) -> tuple[int, bool]:
    """Of what one class is in several models, what asks for most care comes first."""
    return _KINDS.index(part.kind), not part.why


def of_torch() -> dict[str, Part]:
    """The modules of torch itself, and what other libraries put around a model."""
    found = {key: Part(kind) for key, kind in _LIBRARIES.items()}
    for text, part in ((_OF_TOKENS, Part("tokens")), (_OF_ROWS, Part("rows", "", "mixes along the row"))):
        for home, names in re.findall(r"(\w+):([^:]*)(?=\s\w+:|$)", text):
            found |= {f"torch.nn.modules.{home}.{name}": part for name in names.split()}
    return found


def classes() -> Iterator[type[PreTrainedModel]]:
    """The models of transformers that take input_ids."""
    for path in sorted(Path(transformers.__path__[0]).glob("models/*/modeling_*.py")):
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        try:
            members = list(vars(importlib.import_module(name)).values())
        except ImportError:  # of a library that is not here
            continue
        for kind in members:
            own = inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.__module__ == name
            model = own and kind.config_class is not None and not kind.__name__.endswith("PreTrainedModel")
            if model and "input_ids" in inspect.signature(kind.forward).parameters:
                yield kind


def build(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A tiny model, its weights random, nothing drawn at random in training."""
    torch.manual_seed(0)
    config = tiny.shrink(kind.config_class)
    config.update({"is_decoder": False} if kind.__name__.endswith("ForMaskedLM") else {})
    config.update({"is_encoder_decoder": False} if kind.__name__.endswith("EncoderModel") else {})
    return randomize(kind(config))


def prove(model: nn.Module, base: PreTrainedModel, parts: Mapping[str, Part], trusted: list[type]) -> dict:
    """Compare packed with alone, with these parts for the table; an entry of the log.

    Args:
        model: to be patched. base: the transformers model in it. trusted: as for `packattn.patch`.
    """
    table = known.table()
    table.clear()
    table.update(of_torch() | parts)
    call = _no_cache(base)
    beside = BESIDE.get(base.config.model_type, lambda ids, index: {})
    ids = torch.randint(5, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    pairs = zip(ids.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    alone = [_tensors(model(input_ids=one, **beside(one, index), **call)) for one, index in pairs]
    expected, problems = {}, []
    for name in alone[0]:
        values = [output[name] for output in alone]
        if all(v.ndim > 1 and v.shape[:2] == (1, n) for v, n in zip(values, LENGTHS, strict=True)):
            expected[name] = torch.cat([v[0] for v in values])
        elif all(v.ndim > 0 and v.shape == values[0].shape and v.shape[0] == 1 for v in values):
            expected[name] = torch.cat(values)
        else:
            problems.append(f"{name} holds values neither of tokens nor of sequences")
    gradients = _gradients(model, expected)
    found = packattn.patch(model, trusted=trusted)
    start = found._plan.first_position
    for mode in ("eval", "train"):
        model.train(mode == "train")
        packed = _tensors(model(input_ids=ids, position_ids=positions + start, **beside(ids, positions), **call))
        got = {}
        for name, value in expected.items():
            one = packed[name][0] if packed[name].shape[:1] != value.shape[:1] else packed[name]
            if bool(one.isnan().all()):  # one result of a row without a pooler
                continue
            got[name] = one
            if not (off := difference(one, value)) <= TOLERANCE:
                problems.append(f"{mode}: {name} differs by {off:.1e}")
        if not problems and got.keys() == expected.keys():
            off = relative(_gradients(model, got), gradients)
            problems += [] if off <= 4 * TOLERANCE else [f"{mode}: gradients differ by {off:.1e}"]
    return {"how": found.how, "reasons": found.reasons, "unknown": found._plan.unknown, "problems": problems}


def _no_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _tensors(result: Any) -> dict[str, Tensor]:
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): v for name, v in items if isinstance(v, Tensor) and v.is_floating_point()}


def _gradients(model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = sum((v.float() * torch.randn(v.shape, generator=generator)).sum() for v in outputs.values())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return {name: g for (name, _), g in zip(named, found, strict=True) if g is not None}


def of_model(kind: type[PreTrainedModel]) -> dict:
    """The entry of the log for a class of transformers."""
    model = build(kind)
    plan = make_plan(model)
    if plan.refused:
        return {"refused": plan.refused}
    ran: set[int] = set()
    handles = [m.register_forward_hook(lambda m, a, o: ran.add(id(m))) for m in model.modules()]
    ids = torch.arange(5, 12)[None]
    beside = BESIDE.get(model.config.model_type, lambda ids, index: {})
    model(input_ids=ids, **beside(ids, torch.arange(7)[None]), **_no_cache(model))
    for handle in handles:
        handle.remove()
    parts = guess(model, ran)
    entry = prove(model, model, parts, [])
    if entry["how"] == "rows" and not any(part.kind == "rows" for part in parts.values()):
        for module in plan.builders[0][1].modules():
            if parts[_key(module)].kind != "beside":
                parts[_key(module)] = Part("rows", parts[_key(module)].source)
        key = _key(plan.builders[-1][1])
        parts[key] = parts[key]._replace(why=entry["reasons"][0])
    return entry | {"parts": parts}


def adapters() -> dict[str, Any]:
    """Adapters of PEFT for the linear layers of a tiny Llama, each as a function of the model."""
    import peft

    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    layers = ["q_proj", "v_proj", "down_proj"]
    given: dict[str, dict[str, Any]] = {
        "ADALORA": {"total_step": 10},
        "C3A": {"block_size": 8},
        "ROAD": {"group_size": 8},
        "SHIRA": {"r": 2},
        "WAVEFT": {"n_frequency": 10},
        "IA3": {"feedforward_modules": ["down_proj"]},
        "FOURIERFT": {"n_frequency": 10},
        "VBLORA": {"num_vectors": 4, "vector_length": 8},
        "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
        "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [7, 8]},
    }
    lora: dict[str, dict[str, Any]] = {
        "LORA of embeddings": {"target_modules": [*layers, "embed_tokens"]},
        "LORA and modules_to_save": {"modules_to_save": ["lm_head"]},
        "LORA and tokens": {"trainable_token_indices": {"embed_tokens": [7, 8]}},
        "DoRA": {"use_dora": True},
        "DoRA of embeddings": {"use_dora": True, "target_modules": [*layers, "embed_tokens"]},
        "rsLoRA": {"use_rslora": True},
        "LORA of a parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    }
    made = {name: ("LORA", options) for name, options in lora.items()}
    made |= {str(name.value): (name.value, given.get(name.value, {})) for name in kinds}

    def make(name: str, task: str | None) -> nn.Module:
        kind, options = made[name]
        model = build(transformers.LlamaForCausalLM)
        config_class = kinds[kind]
        takes = inspect.signature(config_class).parameters
        defaults = {"target_modules": layers} if "target_modules" in takes else {}
        return randomize(peft.get_peft_model(model, config_class(task_type=task, **defaults | options)))

    return {f"{name}, {task}": (lambda n=name, t=task: make(n, t)) for name in made for task in (None, "CAUSAL_LM")}


def of_adapter(make: Any) -> dict:
    """The entry of the log for an adapter."""
    model = make()
    base = model.get_base_model()
    plain = guess(build(transformers.LlamaForCausalLM), {id(m) for m in base.modules()})
    plain = {key: part._replace(kind="tokens") if part.kind == "beside" else part for key, part in plain.items()}
    own = [m for m in model.modules() if type(m).__module__.startswith("peft.")]
    base.get_input_embeddings().requires_grad_(True)
    parts = {_key(m): Part("tokens", hash_of(forward_of(m))) for m in own}
    for variant in [v for m in own for v in getattr(m, "lora_variant", {}).values()]:
        parts[name_of(inner(type(variant).forward))] = Part("tokens", hash_of(inner(type(variant).forward)))
    return prove(model, base, plain | parts, []) | {"parts": parts}


def worker() -> None:
    """For each name that comes in, print one line of JSON."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, late)
    todo: dict[str, Any] = {f"{k.__module__}.{k.__name__}": lambda k=k: of_model(k) for k in classes()}
    todo |= {f"peft: {name}": lambda m=make: of_adapter(m) for name, make in adapters().items()}
    print(json.dumps(list(todo)), flush=True)
    for line in sys.stdin:
        signal.alarm(SECONDS)
        try:
            entry = todo[line.strip()]()
        except Exception as error:  # the outcome is "not run", with the reason
            entry = {"not run": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps({"name": line.strip()} | entry), flush=True)
        gc.collect()


def write(entries: list[dict]) -> str:
    """known.json, of the entries of the log that found no problem."""
    parts = of_torch()
    for entry in entries:
        if entry.get("problems") or entry.get("unknown") or "parts" not in entry:
            continue
        for key, values in entry["parts"].items():
            part = Part(*values)
            if "<locals>" not in key and not key.startswith("torch."):
                parts[key] = min(part, parts.get(key, part), key=_rank)
    homes: dict[str, dict[str, str]] = defaultdict(dict)
    for key, part in parts.items():
        home, _, name = key.rpartition(".")
        homes[home][name] = " ".join(part).rstrip()
    lines = [
        f"    {json.dumps(home)}: {json.dumps(dict(sorted(names.items())))}" for home, names in sorted(homes.items())
    ]
    version = json.dumps(transformers.__version__)
    return f'{{\n  "transformers": {version},\n  "parts": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


def main() -> int:
    """Prove what the log does not hold yet, and sum up; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE} from the log, run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return 0
    options.log.parent.mkdir(exist_ok=True, parents=True)
    lines = options.log.read_text().splitlines() if options.log.exists() else []
    entries = {entry["name"]: entry for entry in map(json.loads, lines)}
    if options.write:
        TABLE.write_text(write([json.loads(line) for line in lines]))
        return 0
    command = [sys.executable, "-m", "benchmarks.known", "--worker"]
    process = None
    todo: list[str] = []
    with options.log.open("a") as log:
        while process is None or todo:
            if process is None or process.poll() is not None:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                names = json.loads(process.stdout.readline())
                todo = [n for n in names if n not in entries and any(part in n for part in options.only)]
                continue
            name = todo.pop(0)
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            entry = json.loads(line) if line else {"name": name, "not run": f"the process died ({process.wait()})"}
            entries[name] = entry
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(
                name,
                entry.get("how", ""),
                entry.get("problems") or entry.get("not run") or entry.get("refused") or "",
                flush=True,
            )
    process.stdin.close()
    print(Counter(entry.get("how", "not proven") for entry in entries.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
