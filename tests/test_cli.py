"""`python -m packattn`: what info says with and without a compiler, CUDA and a GPU; what the selftest remembers."""

import sys

import pytest
import torch

from packattn import cli, info, ops, selftest


def test_info_names_what_is_missing_and_what_it_costs(monkeypatch):
    assert "packattn._C" in info.report()
    monkeypatch.setattr(ops, "HAS_C", False)
    monkeypatch.setattr(ops, "HAS_C_CUDA", False)
    monkeypatch.setattr(info, "version_of", lambda name: None)
    report = info.report()
    assert "several times slower" in report
    assert "install a C++ compiler" in report
    assert "pip install triton" in report
    assert "pip install packattn[hf]" in report


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
    ],
)
def test_verify_says_why_it_cannot_be_done_and_nothing_else(what, reason, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["packattn", "verify", what])
    assert cli.main() == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(reason)
    assert not printed.out
