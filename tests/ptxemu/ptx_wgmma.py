"""wgmma: products of a warpgroup (four warps) that read shared memory themselves, and complete when they are waited for.

A product is computed when it is issued. What may touch its operands until it is waited for is checked: registers by
a walk over the code (check_registers), shared memory by the SharedDetector. Source: PTX ISA, "Asynchronous Warpgroup
Level Matrix Instructions" (fragments, canonical layouts, matrix descriptor).
"""
import functools
import warnings
from collections import defaultdict

import numpy as np

import ptx_math as pm
from ptx_math import DTYPE, f4, f8, i8, u4
from ptx_memory import MemoryFault, RaceError, RaceWarning, Unsupported
from ptx_ops import SYNC
from ptx_parser import PTXError

ALL = slice(None)
WARPGROUP = 128                # threads
CHUNK = 16                     # bytes that a swizzle moves together
# Operand type -> (bytes, decoder of its array)
ELEMENT = {'bf16': (2, pm.bf16_decode), 'f16': (2, lambda x: x.view(pm.f2)),
           'tf32': (4, lambda x: (x & u4(0xFFFFE000)).view(f4))}
SWIZZLE = {1: 128, 2: 64, 3: 32}       # descriptor bits 62, 63 -> bytes of a row of the pattern


@functools.lru_cache(maxsize=4096)
def tile(descriptor, rows, k, size, mn_major):
    """(byte offsets of the elements [rows, k], first bytes of their chunks) in the shared memory of a CTA.

    rows: M or N. K-major: each row's k elements lie together, eight rows of `width` bytes make a block, blocks are a
    stride (SBO) apart. MN-major: each column's rows lie together, in runs of `width` bytes which are a leading stride
    (LBO) apart; eight columns make a block.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 62 not in SWIZZLE or descriptor >> 49 & 7:
        raise Unsupported('wgmma descriptor without a swizzle or with a base offset')
    width = SWIZZLE[descriptor >> 62]
    row, column = np.arange(rows)[:, None], np.arange(k)
    if mn_major:
        run = width // size
        at = start + row // run * leading + row % run * size + column // 8 * stride + column % 8 * width
    else:
        at = start + row // 8 * stride + row % 8 * width + column * size
    # In a pattern of eight rows of 128 bytes, the number of a row (bits 7 to 9) is added, as bits, to that of a chunk.
    at = at ^ (at >> 7 & width // CHUNK - 1) << 4
    return at, np.unique(at & -CHUNK)


class WarpgroupProducts:
    """Mixed into Machine: the wgmma instructions. Masks hold whole warpgroups."""

    def op_wgmma(self, ins):
        if self.pad % WARPGROUP:
            raise Unsupported('wgmma in a CTA of incomplete warpgroups')
        if 'mma_async' in ins.mods:
            return self.product(ins)
        if 'commit_group' in ins.mods:
            def commit(m):
                self.committed_products[self.warpgroups(m)] += 1
            return SYNC, commit
        if 'wait_group' in ins.mods:
            keep = ins.args[0].value
            return SYNC, lambda m: self.wait_products(m, keep)
        self.require(ins, 'fence')
        return SYNC, lambda m: None

    @staticmethod
    def warpgroups(m):
        """Index of the warpgroups of a mask."""
        return ALL if m is True else m.reshape(-1, WARPGROUP).any(1)

    def product(self, ins):
        """D = A B + D: 64 rows, 16 for each warp; A in registers or in shared memory, B in shared memory."""
        _, n, k = pm.product_shape(ins)
        accumulator, kind, kind_b = ins.types
        if accumulator != 'f32' or kind != kind_b or kind not in ELEMENT:
            raise Unsupported(ins.op)
        size, decode = ELEMENT[kind]
        d, a, b, scale, *rest = ins.args
        sign_a, sign_b, *mn_major = (x.value for x in rest)
        a_mn, b_mn = (bool(mn_major and mn_major[i]) for i in (0, -1))      # with A in registers, B's alone is said
        outs, before = ([place(x, 'f32').reshape(-1, 4, 32) for x in d.value] for place in (self.dst, self.src))
        fragments = [self.src(x, 'b32').reshape(-1, 4, 32) for x in a.value] if a.kind == 'vec' else []
        in_shared = [] if fragments else [self.operand_tile(a, 64, k, size, decode, a_mn)]
        in_shared.append(self.operand_tile(b, n, k, size, decode, b_mn))
        keep, wavefronts = self.pred(scale), (n if fragments else 64 + n) * k * size // 128

        def run(m):
            groups = self.warpgroups(m)
            tiles = [read(groups) for read in in_shared]
            y = tiles[-1][0]
            if fragments:
                x = decode(pm.matrix_a([r[groups].reshape(-1, 32) for r in fragments], DTYPE[kind]))
                x = x.reshape(len(y), 64, k)
            else:
                x = tiles[0][0]
            if self.detector:
                cells = np.concatenate([chunks for _, chunks in tiles], 1)
                self.start_product(np.arange(self.lanes // WARPGROUP)[groups], cells)
            if self.profile:
                here = np.zeros(self.lanes // WARPGROUP, i8)
                here[groups] = wavefronts
                for count in ('wgmma wavefronts', 'wgmma minimum'):
                    self.profile.add(count, self.profile.per_cta(here))
            total = sign_a * sign_b * (x.astype(f8) @ y.astype(f8).swapaxes(1, 2))
            added = keep().reshape(-1, WARPGROUP)[groups, :1, None]
            if added.any():
                c = [v[groups].reshape(-1, 32) for v in before]
                c = np.concatenate([pm.matrix_c(c[i:i + 4]) for i in range(0, len(c), 4)], 2)
                total += np.where(added, c.reshape(total.shape), 0)
            total = total.reshape(-1, 16, n).astype(f4)
            for i in range(0, n, 8):
                for out, v in zip(outs[i // 2:], pm.split_c(total[:, :, i:i + 8])):
                    out[groups] = v.reshape(-1, 4, 32)
        return SYNC, run

    def operand_tile(self, op, rows, k, size, decode, mn_major):
        """Function groups -> (values [groups, rows, k], arena offsets of the chunks [groups, chunks])."""
        descriptors = self.src(op, 'u64').reshape(-1, WARPGROUP)
        window = self.shared_off.reshape(-1, WARPGROUP)[:, :1]
        words = self.mem.words[size]

        def read(groups):
            found, base = descriptors[groups], window[groups]
            if (found != found[:, :1]).any():
                raise PTXError(self.message('the threads of a warpgroup give different matrix descriptors'))
            at, chunks = [], []
            for descriptor in found[:, 0].tolist():
                place, chunk = tile(descriptor, rows, k, size, mn_major)
                if chunk[-1] > self.shared_size - CHUNK:
                    raise MemoryFault(self.message(f'out-of-bounds shared access of a wgmma at address '
                                                   f'{chunk[-1]:#x}, window of {self.shared_size} bytes'))
                at.append(place)
                chunks.append(chunk)
            at = np.stack(at) + base[:, :, None]
            return decode(words[at // size]), np.stack(chunks) + base
        return read

    def start_product(self, groups, chunks):
        """Note that the products of the groups read the chunks until they are waited for."""
        cells = self.detector.start_product(self, groups, chunks)
        self.products.append((groups, self.committed_products[groups], cells))

    def wait_products(self, m, keep):
        """Complete the products of the groups in m, but for the latest `keep` committed ones."""
        waiting = np.zeros(self.lanes // WARPGROUP, bool)
        waiting[self.warpgroups(m)] = True
        pending, self.products = self.products, []
        for groups, number, cells in pending:
            done = waiting[groups] & (number < self.committed_products[groups] - keep)
            if done.any():
                self.detector.end_product(self, groups[done], cells[done])
            if not done.all():
                self.products.append((groups[~done], number[~done], cells[~done]))


# ---- registers ------------------------------------------------------------------------------

def registers(operands):
    """Names of the registers of operands."""
    for op in operands:
        if op.kind == 'reg':
            yield op.value
        elif op.kind == 'vec':
            yield from registers(op.value)
        elif op.kind == 'addr':
            yield from registers([op.value])


def check_registers(kernel, allow_missing_fence=False):
    """Report registers of a wgmma that are used before its wait, or changed before it without a wgmma.fence.

    Every path through the code counts, taken or not. The accumulators of a product in flight may only be those of
    another of its shape. With allow_missing_fence, the first missing wgmma.fence gives a RaceWarning, and no error.
    """
    products = {}              # pc -> (accumulators, registers of A, what else it reads)
    for pc, ins in enumerate(kernel.instrs):
        if ins.base == 'wgmma' and 'mma_async' in ins.mods:
            d, a, *rest = ins.args
            products[pc] = (tuple(registers([d])), tuple(registers([a])) if a.kind == 'vec' else (),
                            tuple(registers(rest)))
    if not products:
        return
    watched = {r for d, a, _ in products.values() for r in (*d, *a)}
    warned = set()

    def report(what, register, ins, allowed=False):
        source = f' ({ins.loc[0]}:{ins.loc[1]})' if ins.loc else ''
        text = f'{kernel.name}: race: {what} ({register}), PTX line {ins.line}: {ins.text}{source}'
        if not allowed:
            raise RaceError(text)
        if what not in warned:
            warned.add(what)
            warnings.warn(text, RaceWarning, stacklevel=5)

    def unfenced(register, ins):
        report('no wgmma.fence after the last change of a register of a wgmma', register, ins, allow_missing_fence)

    def unwaited(register, ins):
        report('register of a wgmma in flight used before its wait', register, ins)

    blocks, entry = _blocks(kernel), ({}, frozenset(watched))
    states, todo = {0: entry}, [0]
    while todo:
        start = todo.pop()
        end, successors = blocks[start]
        after = _walk(kernel, range(start, end), *states[start], products, watched, unfenced, unwaited)
        for pc in successors:
            joined = after if pc not in states else _join(states[pc], after)
            if joined != states.get(pc):
                states[pc] = joined
                todo.append(pc)


def _blocks(kernel):
    """{first pc: (pc behind the last, pcs that follow)} of the runs of instructions without a branch."""
    jumps = {}
    for pc, ins in enumerate(kernel.instrs):
        if ins.base == 'bra':
            targets = [kernel.target(ins, ins.args[0].value)]
        elif ins.base == 'brx':
            targets = [kernel.target(ins, name) for name in kernel.tables[ins.args[1].value]]
        elif ins.base in ('ret', 'exit', 'trap'):
            targets = []
        else:
            continue
        jumps[pc] = targets + [pc + 1] * (ins.guard is not None)
    count = len(kernel.instrs)
    starts = sorted({0, *(pc + 1 for pc in jumps), *(t for targets in jumps.values() for t in targets)} - {count})
    return {start: (end, [t for t in jumps.get(end - 1, [end]) if t < count])
            for start, end in zip(starts, [*starts[1:], count])}


def _join(one, other):
    """In flight on either path, the fewest groups committed since; changed on either path."""
    flying = defaultdict(list)
    for state in (one[0], other[0]):
        for register, found in state.items():
            flying[register].append(found)
    return {register: min(found) for register, found in flying.items()}, one[1] | other[1]


def _walk(kernel, pcs, flying, changed, products, watched, unfenced, unwaited):
    """The state behind a block: {register in flight: (groups committed since, its role)}, registers changed since the
    last wgmma.fence."""
    flying, changed = dict(flying), set(changed)

    for pc in pcs:
        ins = kernel.instrs[pc]
        if pc in products:
            accumulators, a, others = products[pc]
            role = 'accumulator of ' + '.'.join(m for m in ins.mods if pm.SHAPE.fullmatch(m))
            for register, wanted in (*((r, role) for r in accumulators), *((r, 'A') for r in (*a, *others))):
                if register in changed:
                    unfenced(register, ins)
                if register in flying and flying[register][1] != wanted:
                    unwaited(register, ins)
            flying |= dict.fromkeys(a, (0, 'A')) | dict.fromkeys(accumulators, (0, role))
        elif ins.base == 'wgmma':
            if 'fence' in ins.mods:
                changed.clear()
            elif 'commit_group' in ins.mods:
                flying = {r: (age + 1, role) for r, (age, role) in flying.items()}
            else:
                keep = ins.args[0].value
                flying = {r: (age, role) for r, (age, role) in flying.items() if age <= keep}
        else:
            used = watched.intersection(registers([*ins.args, *([ins.guard] if ins.guard else [])]))
            for register in used & flying.keys():
                unwaited(register, ins)
            if used:
                changed |= used.intersection(registers(op for op in ins.args[:1] if op.kind in ('reg', 'vec')))
    return flying, frozenset(changed)
