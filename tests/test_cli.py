"""`python -m packattn`: what info says with and without a compiler, CUDA and a GPU; what the selftest remembers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import packattn
from packattn import cli, info, ops, requirements, selftest


def test_info_names_what_is_missing_and_what_it_costs(monkeypatch):
    assert "packattn._C" in info.report()
    monkeypatch.setattr(ops, "HAS_C", False)
    monkeypatch.setattr(ops, "HAS_C_CUDA", False)
    monkeypatch.setattr(info, "version_of", lambda name: None)
    report = info.report()
    assert "several times slower" in report
    assert f"install a C++ compiler and run `python setup.py build_ext --inplace` in {Path.cwd()}" in report
    assert "run `pip install triton`" in report
    assert 'run `pip install "transformers>=' in report
    assert '`pip install --no-build-isolation ".[hf]"`' in report
    monkeypatch.setattr(requirements, "__file__", "/site-packages/packattn/requirements.py")
    assert "run `pip install --no-build-isolation .` in the folder of packattn's source" in info.report()


def test_info_says_which_packattn_it_speaks_of_and_which_it_hides(tmp_path):
    """A source checkout, as the current folder, comes before what pip installed."""
    installed, checkout = tmp_path / "site-packages", tmp_path / "source"
    for folder in (installed, checkout):
        folder.mkdir()
    shutil.copytree(
        Path(packattn.__file__).parent, installed / "packattn", ignore=shutil.ignore_patterns("__pycache__")
    )
    (checkout / "packattn").symlink_to(Path(packattn.__file__).parent)

    def said(folder):
        code = f"import sys; sys.path.insert(1, {str(installed)!r}); from packattn import info; print(info.report())"
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": ""}, capture_output=True, text=True
        )
        return run.stdout

    report = said(checkout)
    assert re.search(rf"packattn +{packattn.__version__}, {checkout}/packattn\n", report)
    assert f"shadows {installed}/packattn: {checkout} comes first in sys.path; run Python in another folder" in report
    report = said(tmp_path)
    assert re.search(rf"packattn +{packattn.__version__}, {installed}/packattn\n", report)
    assert str(checkout) not in report


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("99.0", "newer than {newest}, the newest tested"),
        ("0.9.1", "older than {oldest}, the oldest tested"),
        ("{newest}.1+cu130", ""),
        ("{oldest}.0", ""),
    ],
)
def test_info_says_which_versions_are_untested(version, words, monkeypatch):
    for name, (oldest, newest) in requirements.TESTED.items():
        bounds = {"oldest": oldest, "newest": newest}
        found = requirements.outside_tested(name, version.format(**bounds))
        assert found == words.format(**bounds)
    monkeypatch.setattr(info, "version_of", lambda name: "99.1.dev3")
    assert f"99.1.dev3, newer than {requirements.TESTED['triton'][1]}, the newest tested" in info.report()


def test_a_gpu_is_not_verified_until_the_selftest_has_passed(monkeypatch, tmp_path):
    monkeypatch.setattr(info, "RECORD", tmp_path / "cache" / "selftest.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert "not verified on this GPU; run `python -m packattn selftest`" in info.report()

    monkeypatch.setattr(selftest, "run_all", lambda backend, device: iter([("a case", "wrong by 1")]))
    assert cli.run_selftest() == 1
    assert "not verified" in info.report()

    monkeypatch.setattr(selftest, "run_all", lambda backend, device: iter([("a case", None)]))
    assert cli.run_selftest() == 0
    assert "verified on 20" in info.report()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    assert "not verified" in info.report()


def test_selftest_reports_what_fails(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:2])
    monkeypatch.setattr(sys, "argv", ["packattn", "selftest"])
    assert cli.main() == 0
    assert "torch on cpu: " in capsys.readouterr().out
    monkeypatch.setattr(selftest, "check_isolation", lambda *_: 1 / 0)
    problems = dict(selftest.run_all("torch", "cpu"))
    assert problems["boundaries"] is None
    assert "ZeroDivisionError" in problems["no leak, causal in torch.float32"]


def test_a_launch_happens_on_the_device_of_its_tensors(monkeypatch):
    pytest.importorskip("triton")
    from packattn.kernels import launch

    assert isinstance(launch._on(torch.device("cuda", 3)), torch.cuda.device)
    assert launch._on(torch.device("cuda", 3)).idx == 3


def test_verify_shows_the_leak_of_plain_transformers_and_its_end(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["packattn", "verify", "llama", "--plain", "--lengths", "4", "6"])
    assert cli.main() == 1
    printed = capsys.readouterr().out
    assert "NOT ISOLATED" in printed
    assert "the first layer that leaks: model.layers.0.self_attn (LlamaAttention)" in printed
    monkeypatch.setattr(sys, "argv", ["packattn", "verify", "llama", "--lengths", "4", "6"])
    assert cli.main() == 0
    assert "isolated and exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("t5", "error: packattn cannot isolate packed sequences in T5"),
        ("no_such_type", "error: 'no_such_type' is neither a folder"),
        ("unknown/model", "error: 'unknown/model' is neither a folder, nor a model type that"),
        ("./no/such/folder", "error: there is no folder './no/such/folder'"),
        ("model.gz", "error: model.gz is a file. Give the folder"),
        ("empty", "error: empty holds no config.json. Give the folder"),
    ],
)
def test_verify_says_why_it_cannot_be_done_and_nothing_else(what, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gz").write_bytes(b"\x1f\x8b")
    monkeypatch.setattr(sys, "argv", ["packattn", "verify", what])
    assert cli.main() == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(reason)
    assert not printed.out


def test_verify_takes_a_name_of_the_hub(capsys, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    from packattn.hf.tiny import load

    load("llama").save_pretrained(tmp_path)
    asked, of_folder = [], transformers.PreTrainedModel.from_pretrained.__func__
    read = transformers.AutoConfig.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: asked.append(name) or read(tmp_path))
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "from_pretrained", classmethod(lambda cls, name: of_folder(cls, tmp_path))
    )
    monkeypatch.setattr(sys, "argv", ["packattn", "verify", "some/Model-1.5_b", "--lengths", "4", "6"])
    assert cli.main() == 0
    assert asked == ["some/Model-1.5_b"]
    assert "isolated and exact" in capsys.readouterr().out
