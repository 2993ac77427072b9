"""The benchmarks that need no GPU: what they count is what the kernels do."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    compiled,
    emulated,
    flex_template,
    gate,
    gpu_bound,
    packs,
    tile_picture,
    tiles,
    timing,
    work_efficiency,
)
from packattn import PackedMask
from packattn.kernels import launch
from packattn.kernels.table import DIMS, FAMILIES, TABLE, Tile, parts_of

LENGTHS = [37, 5, 60, 1, 30]


@pytest.mark.parametrize("lengths", [LENGTHS, [133], [1] * 133, [64, 64, 5]], ids=str)
def test_the_picture_visits_every_visible_pair_once(lengths):
    mask, block, step = PackedMask.causal(lengths=lengths), 8, 16
    dense, start = mask.to_dense(), mask.k_start.tolist()
    seen = torch.zeros_like(dense, dtype=torch.int32)
    for m0 in range(0, 133, step):
        rows = slice(m0, min(m0 + step, 133))
        for n0, n1, masked in tile_picture.blocks_of_tile(mask, m0, rows.stop - 1, block):
            part = dense[rows, n0:n1]
            if not masked:
                first = torch.tensor([start[i] == start[m0] for i in range(rows.start, rows.stop)])
                # Without the mask: the rows of the first sequence see all of the block, the others none of it.
                assert part[first].all()
                assert not part[~first].any()
            seen[rows, n0:n1] += part.int()
    assert torch.equal(seen, dense.int())


@pytest.mark.parametrize("group", [1, 3, 8])
def test_work_is_counted_as_the_kernels_execute_it(group):
    lengths, rows, block = np.array(LENGTHS), 48, 8
    work = work_efficiency.packed_tiles(lengths, group, rows, block, keys=False)
    mask = PackedMask.causal(lengths=LENGTHS)
    executed = 0
    for first_row in range(0, 133 * group, rows):
        last = min((first_row + rows - 1) // group, 132)
        executed += rows * block * len(tile_picture.blocks_of_tile(mask, first_row // group, last, block))
    assert work.executed == executed
    assert work.useful == int(mask.to_dense().sum()) * group


def test_the_launch_table_keeps_its_aims_on_real_lengths():
    for dim, group in ((64, 3), (128, 8)):
        for name, lengths in work_efficiency.streams(65_536).items():
            ours = work_efficiency.count("packattn", lengths, group, dim, "sm80")
            flash = work_efficiency.count("FlashAttention-2", lengths, group, dim, "sm80")
            least = {"math": 1.5, "short tasks, at most 4,096": 1.15}.get(name, 0.98)
            assert ours[0].efficiency >= least * flash[0].efficiency, (name, dim, group)


def test_one_head_stands_for_all_and_an_order_only_permutes(monkeypatch):
    shape, lengths = gpu_bound.Shape(4, 2, 16), [50, 9, 70]
    found = gpu_bound.profile_ours(lengths, shape, 80)
    assert set(found) == {"forward", "delta", "dq", "dkdv"}
    small = dataclasses.replace(gpu_bound.ptx_bound.GPUS["A100"], sms=8)
    monkeypatch.setitem(gpu_bound.ptx_bound.GPUS, "A100", small)
    orders = gpu_bound.orders(lengths, shape, "A100")
    mask = PackedMask.causal(lengths=lengths)
    profiles = {}

    def run(kernel, grid, names, values):
        profiles[len(profiles)] = profile = gpu_bound.Profile()
        emulated.emulate(kernel, grid, names, values, profile=profile)

    q, k, v = (torch.zeros(129, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    rest = (None, None, None, None, 0.25, 0.0, 0.0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 8)
    with emulated.launches(80, run):
        given = launch.launch_order(*mask[:4], 4, 2, 16, 16, q.dtype)
        out, lse, norm = launch.forward(q, k, v, *mask[:4], given, *rest)
        launch.backward(out, None, q, k, v, out, lse, norm, *mask[:4], given, *rest)
    for (kernel, lying), whole in zip(found.items(), profiles.values(), strict=True):
        profile = lying if kernel == "delta" else gpu_bound.in_order(lying, orders[kernel])
        assert profile.ctas == whole.ctas
        for name in ("mma bf16", "mufu", "shared store", "barrier"):
            if name in whole.counts:
                assert profile.counts[name].tolist() == whole.counts[name].tolist(), name


def test_tiles_are_timed_through_the_launchers(monkeypatch, capsys):
    monkeypatch.setattr(timing, "_REPEATS", 1)
    monkeypatch.setattr(timing, "_seconds", lambda call, device: (call(), 1.5)[1])
    seen = []
    good, bad = Tile(64, 32, 4, 1, 64), Tile(48, 32, 4, 1, 64)  # 48 rows: no power of two
    with emulated.launches(80, lambda kernel, *_: seen.append(kernel.metadata.name)):
        found = timing.time_tiles(torch.device("cpu"), "dq", torch.float16, 32, 4, [good, bad], tokens=64)
    assert found == {good: 2 * 1.5}  # a length set each
    assert {"_fwd_kernel", "_bwd_dq_kernel"} <= set(seen)
    assert "dq 48x32/4/1/64 left out" in capsys.readouterr().out


def test_a_candidate_that_breaks_a_rule_of_the_gate_is_none(monkeypatch):
    key = ("sm86", "dq", "32-bit", "grouped", 64)
    good = {"spills": 0, "shared": 0, "blocks": 1, "barriers": 0, "shared_stores": 0, "wgmma": 0}
    faults = {"64x64/4/1/64": {"shared": 10**6}, "32x64/4/1/64": {"blocks": 0}, "32x32/4/1/64": {"spills": 33}}
    measured = []

    def measure(row, tile):
        measured.append(row)
        if str(tile) == "16x16/4/1/64":
            raise ValueError("what the compiler refuses")
        # Rules hold for every target that takes the entry: here the last breaks one.
        fault = faults.get(str(tile), {}) if row.target == 120 else {}
        return {"tile": str(tile)} | good | fault

    monkeypatch.setattr(gate, "measure", measure)
    refused = [Tile.read(text) for text in (*faults, "16x16/4/1/64")]
    kept = Tile(8, 8, 4, 1, 64)
    assert tiles.chosen((key, [*refused, kept, Tile(4, 4, 4, 1, 64)], None)) == kept
    assert {row.target for row in measured} == {80, 86, 89, 90, 100, 120}
    assert {row.head_dim for row in measured} == {40, 64}
    with pytest.raises(ValueError, match="must not break a rule of the gate, all 4 do"):
        tiles.chosen((key, refused, None))
    assert tiles.chosen((key, refused, refused[2])) == refused[2]


def test_every_entry_of_the_launch_table_has_rows_in_the_gate():
    assert {row.key for row in gate.every_row()} == set(TABLE)


def test_the_log_of_the_search_is_ranked_by_cost():
    cell = ("sm80", "dkdv", torch.bfloat16, 128)
    first, second, third, other = tiles.candidates(*cell)[:4]

    def line(tile, **figures):
        loops = [[100, 64, 2, 0, 0, 0, figures.pop("local", 0), 100]]
        line = {"family": "sm80", "pass": "dkdv", "dtype": "16-bit", "dim": 128, "tile": list(tile)}
        return line | {"registers": 128, "spills": 0, "shared": 1024, "loops": loops} | figures

    lines = [
        line(first, bound={"alone": 3.0, "grouped": 1.0}),
        line(second, bound={"alone": 1.0, "grouped": 3.0}, local=300),  # spills in the loop: 13 times the cost
        line(third, bound={"alone": 2.0, "grouped": 2.0}),
        {"family": "sm80", "pass": "dkdv", "dtype": "16-bit", "dim": 128, "tile": list(other), "error": "refused"},
        line(Tile(1, 1, 1, 1, 1), bound={"alone": 0.0, "grouped": 0.0}),  # of an older search
    ]
    found = tiles.ranked(lines, [cell])
    assert found["sm80", "dkdv", "16-bit", "grouped", 128] == [first, third, second]
    assert found["sm80", "dkdv", "16-bit", "alone", 128] == [third, first, second]


def test_a_searched_row_is_written_where_it_belongs(tmp_path, monkeypatch):
    from packattn.kernels import table

    copy = tmp_path / "table.py"
    copy.write_text(Path(table.__file__).read_text())
    monkeypatch.setattr(table, "__file__", str(copy))
    key, tile = ("sm90", "dq", "16-bit", "grouped", 64), Tile(16, 16, 1, 1, 64)
    tiles.write({key: tile})
    rows = copy.read_text().split('_ROWS = """\n')[1].split('"""')[0]
    assert table._read(rows) == TABLE | {key: tile}


def test_the_table_has_every_row_and_every_head_dim_its_parts():
    assert len(TABLE) == len(FAMILIES) * 3 * 2 * 2 * len(DIMS)
    for dim in (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 512, 576):
        for width in (64, 128):
            parts = parts_of(dim, width)
            assert sum(parts[:-1]) < dim <= sum(parts)
            assert len(set(parts[:-1])) <= 1


def test_flex_attentions_template_compiles_beside_ours():
    tile = Tile(64, 32, 4, 2, 64)
    ours = compiled.report_of(compiled.compile_pass("forward", 80, torch.bfloat16, tile, 4, 64))
    theirs = compiled.report_of(flex_template.compile_flex(80, tile, 4, 64))
    assert ours.main.products == theirs.main.products
    assert ours.main.instructions < theirs.main.instructions


def test_a_hash_of_the_kernels_sees_code_and_not_comments(tmp_path, monkeypatch):
    before = compiled.source_hash()
    for change, same in (("# a comment\n", True), ("x = 1\n", False)):
        path = tmp_path / "forward.py"
        path.write_text(Path(compiled.forward.__file__).read_text() + change)
        with monkeypatch.context() as inside:
            inside.setattr(compiled.forward, "__file__", str(path))
            assert (compiled.source_hash() == before) == same


def test_lengths_are_drawn_to_fill_a_stream():
    assert sum(packs.draw("math", 1000)) == 1000
    assert max(packs.draw("whole files", 100_000, 4096)) <= 4096
    assert packs.draw("math", 1000) == packs.draw("math", 1000)
