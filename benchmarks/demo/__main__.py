"""`python -m benchmarks.demo`: both acts, tables on the screen, CSV files and pictures in out/demo.

Ends with 1 if a packed loss differs from the loss of the same examples run alone, or if packattn leaks.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.demo import report
from benchmarks.demo.acts import acts
from benchmarks.demo.approaches import APPROACHES
from benchmarks.demo.assets import ROOT
from benchmarks.demo.checks import check
from benchmarks.demo.training import device_and_precision, in_own_process, train


def main() -> int:
    """Run the demo; the exit status says whether everything held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="times the examples of both acts (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder of the CSV files and pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    device, dtype = device_and_precision()
    finetune, curve = acts(device, options.scale)

    print(
        f"\n1. Is it right? SmolLM2-135M on {device.type}, one mini-batch of {finetune.minibatch} tasks\n", flush=True
    )
    checks = in_own_process(check, finetune)
    print(checks.verify)
    print(
        f"\n  loss of {finetune.minibatch} tasks packed {checks.loss_packed:.6f}, one by one {checks.loss_alone:.6f}, "
        f"difference {abs(checks.loss_packed - checks.loss_alone):.1e} (allowed {checks.allowed:.1e})"
    )

    print(f"\n2. Fine-tuning SmolLM2-135M on {finetune.examples} short tasks, {device.type}, {dtype}\n", flush=True)
    runs = [in_own_process(train, finetune, approach) for approach in APPROACHES]
    print(report.finetune_table(runs, checks), flush=True)
    report.write_csv(options.out / "finetune.csv", runs)
    report.draw_speed(options.out / "speed.png", runs, checks)

    print(f"\n3. A small random Llama on {curve.examples} documented functions of Python's library\n", flush=True)
    runs = [in_own_process(train, curve, approach) for approach in APPROACHES]
    print(report.curve_table(runs), flush=True)
    report.write_csv(options.out / "curve.csv", runs)
    report.draw_curves(options.out / "curve.png", runs)
    report.draw_mask(options.out / "mask.png")

    failures = checks.failures()
    for failure in failures:
        print(f"\nFAILED: {failure}")
    print(f"\nTables and pictures are in {options.out} ({time.perf_counter() - began:.0f} s in all).")
    if not failures:
        print("Packed equals alone, and no example sees another.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
