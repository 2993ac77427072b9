"""Tests of wgmma, stmatrix and the proxy fence, against plain matrix products, and of what reports a wrong order."""
import functools
import re
import warnings

import numpy as np
import pytest

import ptxemu
from ptxemu import Deadlock, MemoryFault, Profile, PTXError, RaceError, RaceWarning, Unsupported, run_ptx, run_triton
from test_ptxemu import a_16, attention_case, attention_kernel, c_place, matmul_kernel

RNG = np.random.default_rng(0)
M, K, STEP = 64, 64, 16
MODE = {128: 1, 64: 2, 32: 3}            # of a descriptor, by the bytes of the swizzle
HEAD = '.version 8.0\n.target sm_90a\n.address_size 64\n'


def encode(x, kind):
    """Small integers as 16-bit numbers."""
    return x.astype('f2').view('u2') if kind == 'f16' else (x.astype('f4').view('u4') >> 16).astype('u2')


def image(x, swizzle, mn_major):
    """The 16-bit matrix [rows, K] as wgmma wants it in shared memory, flat.

    Lines of `swizzle` bytes, along K or along the rows, lie behind one another. The 16-byte chunks of each line are
    exchanged: their numbers are xor-ed with that of the 128 bytes in which the line begins.
    """
    lines = x.T if mn_major else x
    wide = swizzle // 2
    out = []
    for block in range(0, lines.shape[1], wide):
        for i, line in enumerate(lines[:, block:block + wide]):
            chunks = line.reshape(-1, 8)
            out.append(chunks[np.arange(len(chunks)) ^ i * swizzle // 128 % len(chunks)])
    return np.concatenate(out).ravel()


def descriptor(start, rows, swizzle, mn_major, step):
    """The descriptor of the columns 16 step, ... of an image that begins at byte `start`."""
    if mn_major:
        start += STEP * step * swizzle
        leading = K * swizzle
    else:
        block, inside = divmod(STEP * step * 2, swizzle)
        start += block * rows * swizzle + inside
        leading = 16
    return start >> 4 | leading >> 4 << 16 | 8 * swizzle >> 4 << 32 | MODE[swizzle] << 62


def threads_of_a(x):
    """A fragments: [thread, step, element] of a matrix [64, K]."""
    return np.array([[[x[16 * (t // 32) + row, STEP * s + column] for row, column in (a_16(t % 32, i) for i in range(8))]
                      for s in range(K // STEP)] for t in range(128)])


def places(n):
    """[thread, accumulator] -> row and column of D."""
    pairs = [[(16 * (t // 32) + c_place(t % 32, i)[0], 8 * j + c_place(t % 32, i)[1]) for j in range(n // 8)
              for i in range(4)] for t in range(128)]
    return tuple(np.moveaxis(np.array(pairs), 2, 0))


def instruction(n, kind, a, b, scale='1', signs='1, 1', majors='', first=0):
    """wgmma of accumulators %f<first>, ...; registers are written %f, %a, %d."""
    d = ', '.join(f'%f{first + i}' for i in range(n // 2))
    return f'wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {a}, {b}, {scale}, {signs}{majors};\n'


def code(n, shared_bytes, body, fragments=False):
    """A kernel of P0 (image of shared memory), P1 (accumulators in), P2 (out), P3 (fragments of A)."""
    return (f'{HEAD}.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)\n{{\n'
            f'.reg .pred %p<4>;\n.reg .b32 %r<20>, %t, %f<{n + 1}>, %a<16>;\n.reg .b64 %d<20>, P<4>;\n'
            f'.shared .align 1024 .b8 s[{shared_bytes}];\n'
            + ''.join(f'ld.param.u64 P{i}, [p{i}];\n' for i in range(4))
            + f'mov.u32 %t, %tid.x;\nmov.u32 %r1, s; mad.lo.u32 %r2, %t, 16, %r1; mad.wide.u32 %d1, %t, 16, P0;\n'
            f'mad.wide.u32 %d2, %t, {2 * n}, P1; mad.wide.u32 %d3, %t, {2 * n}, P2; mad.wide.u32 %d4, %t, 64, P3;\n'
            + ''.join(f'ld.global.b32 %f{i}, [%d2+{4 * i}];\n' for i in range(n // 2))
            + ''.join(f'ld.global.b32 %a{i}, [%d4+{4 * i}];\n' for i in range(16 * fragments)) + body + '\nret;\n}\n')


def fill(size):
    """Every thread copies 16 bytes at a time to shared memory."""
    return ''.join(f'ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1+{at}]; st.shared.v4.b32 [%r2+{at}], '
                   f'{{%r4, %r5, %r6, %r7}};\n' for at in range(0, size, 2048))


def store(n):
    return ''.join(f'st.global.b32 [%d3+{4 * i}], %f{i};\n' for i in range(n // 2))


ORDER = 'fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;\n'
WAIT = 'wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n'


def product(n, kind, swizzle, a_in, b_mn, change=lambda text: text, room=0, **checks):
    """(D as the emulator has it, A B + C) of small integers; a_in: registers, K or MN; room: bytes behind B."""
    a, b, c = RNG.integers(-8, 9, (M, K)), RNG.integers(-8, 9, (n, K)), RNG.integers(-99, 99, (M, n)).astype('f4')
    images = [] if a_in == 'registers' else [image(encode(a, kind), swizzle, a_in == 'MN')]
    start_b = sum(len(x) for x in images) * 2
    shared = np.concatenate([*images, image(encode(b, kind), swizzle, b_mn)])
    shared = np.concatenate([shared, np.zeros(-len(shared) % 1024 + room // 2, 'u2')])
    fragments = np.ascontiguousarray(encode(threads_of_a(a), kind))
    text = fill(2 * len(shared)) + ORDER
    for s in range(K // STEP):
        if a_in == 'registers':
            left, majors = f'{{{", ".join(f"%a{4 * s + i}" for i in range(4))}}}', f', {int(b_mn)}'
        else:
            text += f'mov.u64 %d10, {descriptor(0, M, swizzle, a_in == "MN", s)};\n'
            left, majors = '%d10', f', {int(a_in == "MN")}, {int(b_mn)}'
        text += f'mov.u64 %d11, {descriptor(start_b, n, swizzle, b_mn, s)};\n'
        text += instruction(n, kind, left, '%d11', majors=majors)
    text = code(n, 2 * len(shared), text + WAIT + store(n), fragments=True)
    rows, columns = places(n)
    d = np.zeros((128, n // 2), 'f4')
    before = np.ascontiguousarray(c[rows, columns])
    run_ptx(change(text), 'k', 1, 128, [shared, before, d, fragments], **checks)
    got = np.zeros((M, n), 'f4')
    got[rows, columns] = d
    return got, a @ b.T + c


@pytest.mark.parametrize('kind', ['bf16', 'f16'])
@pytest.mark.parametrize('n', [16, 32, 64, 128])
def test_a_product_is_that_of_the_matrices(n, kind):
    for swizzle in MODE:
        for a_in in ('registers', 'K', 'MN'):
            for b_mn in (False, True):
                if not b_mn or n >= swizzle // 2:
                    got, want = product(n, kind, swizzle, a_in, b_mn, check_races=True, check_uninit=True)
                    assert np.array_equal(got, want), (swizzle, a_in, b_mn)


@pytest.mark.parametrize('a_in,b_mn', [('registers', False), ('registers', True), ('K', False), ('MN', True)])
def test_a_wrong_swizzle_gives_a_wrong_result(a_in, b_mn):
    def other(text):
        return re.sub(r'(mov.u64 %d11, )(\d+)', lambda m: m[1] + str(int(m[2]) ^ (1 ^ 2) << 62), text)
    got, want = product(64, 'bf16', 128, a_in, b_mn, other, room=TILE)
    assert not np.array_equal(got, want)
    got, want = product(64, 'bf16', 128, a_in, b_mn, lambda text: re.sub(
        r', [01];', lambda m: f', {1 - int(m[0][2])};', text), room=TILE)      # the other major
    assert not np.array_equal(got, want)


def test_scale_and_signs():
    def changed(scale, signs):
        got, want = product(32, 'bf16', 64, 'registers', False, lambda text: text.replace(
            '%d11, 1, 1, 1', f'%d11, {scale}, {signs}', 1), check_races=True)
        return got, want
    before, want = changed('1', '1, 1')
    assert np.array_equal(before, want)
    for scale in ('%p1', '0'):                     # %p1 is false: C is not added, nor what its registers held
        got, want = changed(scale, '1, 1')
        c = want - got
        assert np.abs(c).max() <= 99 and np.abs(c).max() > 50
    for signs in ('-1, 1', '1, -1'):
        got, want = changed('1', signs)
        assert not np.array_equal(got, want)
    got, want = changed('1', '-1, -1')
    assert np.array_equal(got, want)


@pytest.mark.parametrize('trans', ['', '.trans'])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(trans, count):
    x, y = RNG.integers(0, 2**32, (128, 4)).astype('u4'), np.zeros((128, 64), 'u4')
    regs = ', '.join(f'%r{4 + i}' for i in range(count))
    back = ', '.join(f'%r{10 + i}' for i in range(count))
    run_ptx(code(128, 2048, f'''
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2], {{{regs}}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{back}}}, [%r2];
        ''' + ''.join(f'st.global.b32 [%d3+{4 * i}], %r{10 + i};\n' for i in range(count))), 'k', 1, 128,
        [x, y, y, x], check_races=True)
    assert (y[:, :count] == x[:, :count]).all()


# ---- order ----------------------------------------------------------------------------------

TILE = 8192                    # bytes of an image of B: n = 64, K = 64, 128-byte lines
B = [descriptor(TILE * i, 64, 128, False, 0) for i in range(2)]
FENCE, BAR = 'fence.proxy.async.shared::cta;\n', 'bar.sync 0;\n'
BEGIN, COMMIT = 'wgmma.fence.sync.aligned;\n', 'wgmma.commit_group.sync.aligned;\n'
FILL = fill(2 * TILE) + f'mov.u64 %d10, {B[0]}; mov.u64 %d11, {B[1]};\n'
FIRST = instruction(64, 'bf16', '{%a0, %a1, %a2, %a3}', '%d10', majors=', 0')
SECOND = instruction(64, 'bf16', '{%a4, %a5, %a6, %a7}', '%d11', majors=', 0', first=32)
OVERWRITE = 'st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};\n'
COPY = 'cp.async.cg.shared.global [%r2], [%d1], 16;\n'


def wait(keep):
    return f'wgmma.wait_group.sync.aligned {keep};\n'


def run(*parts, threads=128, **checks):
    """Returns the accumulators of the first product."""
    shared, c, d = RNG.integers(0, 2**14, TILE).astype('u2'), np.zeros((256, 32), 'f4'), np.zeros((256, 32), 'f4')
    run_ptx(code(64, 2 * TILE, ''.join(parts) + store(64), fragments=True), 'k', 2, threads,
            [shared, c, d, np.ones((256, 32), 'u2')], **{'check_races': True, **checks})
    return d


READY = FILL + FENCE + BAR + BEGIN


@pytest.mark.parametrize('parts', [
    [READY, FIRST, COMMIT, wait(0)],
    [FILL, BAR, FENCE, BEGIN, FIRST, COMMIT, wait(0)],                    # the reader's fence, behind the barrier
    [READY, FIRST, COMMIT, wait(0), BAR, OVERWRITE],
    [READY, FIRST, COMMIT, SECOND, COMMIT, wait(1)],                      # which leaves the second in flight
    [READY, FIRST, FIRST.replace('%a0, %a1', '%a4, %a5'), COMMIT, wait(0)],    # one accumulator after the other
    [READY, SECOND, COMMIT, FIRST, COMMIT, wait(1), BAR, OVERWRITE.replace('[%r2]', f'[%r2+{TILE}]'), wait(0)],
    [READY, 'mov.u32 %r9, 0;\nLOOP:\n', FIRST, COMMIT, wait(0), 'add.u32 %f0, %f0, 0; add.u32 %r9, %r9, 1;\n', BEGIN,
     'setp.lt.u32 %p1, %r9, 3;\n@%p1 bra LOOP;\n'],
])
def test_what_is_in_order_passes(parts):
    run(*parts, check_uninit=True)


@pytest.mark.parametrize('what,parts', [
    ('without a fence.proxy.async', [FILL, BAR, BEGIN, FIRST, COMMIT, wait(0)]),
    ('without a fence.proxy.async', [FENCE, FILL, BAR, BEGIN, FIRST, COMMIT, wait(0)]),
    ('without a fence.proxy.async', [READY, OVERWRITE, BAR, FIRST, COMMIT, wait(0)]),
    ('without a fence.proxy.async', [READY.replace('.shared::cta', '.global'), FIRST, COMMIT, wait(0)]),
    ('without a fence.proxy.async', [READY, COPY, 'cp.async.wait_all;\n', BAR, FIRST, COMMIT, wait(0)]),
    ('a barrier after the write', [FILL, FENCE, BEGIN, FIRST, COMMIT, wait(0)]),
    ('while a cp.async to it is in flight', [READY, COPY, FENCE, BAR, FIRST, COMMIT, wait(0)]),
    ('write while a wgmma in flight reads it', [READY, FIRST, COMMIT, BAR, OVERWRITE, wait(0)]),
    ('write while a wgmma in flight reads it', [READY, FIRST, COMMIT, BAR, COPY, wait(0)]),
    ('write while a wgmma in flight reads it', [READY, FIRST, wait(0), BAR, OVERWRITE, COMMIT, wait(0)]),
    ('write while a wgmma in flight reads it', [READY, SECOND, COMMIT, FIRST, COMMIT, wait(1), BAR, OVERWRITE, wait(0)]),
    ('write while a wgmma in flight reads it', [READY, FIRST, COMMIT, BAR, 'stmatrix.sync.aligned.m8n8.x4.shared.b16 '
                                                '[%r2], {%r4, %r5, %r6, %r7};\n', wait(0)]),
    ('write without a barrier after a read', [READY, FIRST, COMMIT, wait(0), OVERWRITE]),
    ('used before its wait', [READY, FIRST, COMMIT]),
    ('used before its wait', [READY, FIRST, wait(0)]),
    ('used before its wait', [READY, FIRST, COMMIT, wait(1)]),
    ('used before its wait', [READY, SECOND, COMMIT, FIRST, COMMIT, wait(1)]),
    ('used before its wait', [READY, FIRST, COMMIT, 'add.u32 %a0, %a0, 1;\n', wait(0)]),
    ('used before its wait', [READY, FIRST, COMMIT, SECOND.replace('%a4', '%f0'), COMMIT, wait(0)]),
    ('used before its wait', [READY, FIRST, COMMIT, SECOND.replace('%f32', '%a0'), COMMIT, wait(0)]),
    ('used before its wait', [READY, FIRST, COMMIT, instruction(32, 'bf16', '{%a0, %a1, %a2, %a3}', '%d10',
                                                                majors=', 0'), COMMIT, wait(0)]),
    ('used before its wait', [READY, 'LOOP: mov.u32 %r9, %f0;\n', BEGIN, FIRST, COMMIT, '@%p1 bra LOOP;\n', wait(0)]),
    ('no wgmma.fence', [FILL, FENCE, BAR, FIRST, COMMIT, wait(0)]),
    ('no wgmma.fence', [READY, 'add.u32 %a0, %a0, 1;\n', FIRST, COMMIT, wait(0)]),
    ('no wgmma.fence', [READY, 'LOOP:\n', FIRST, COMMIT, wait(0), 'add.u32 %f0, %f0, 0;\n@%p1 bra LOOP;\n']),
])
def test_what_is_out_of_order_is_reported(what, parts):
    with pytest.raises(RaceError, match=what):
        run(*parts)
    run(*parts, check_races=False)                          # eager execution hides it


@pytest.mark.parametrize('name,what,parts', [
    ('fence.proxy.async', 'without a fence.proxy.async', [FILL, BAR, BEGIN]),
    ('wgmma.fence', 'no wgmma.fence', [FILL, FENCE, BAR])])
def test_a_missing_fence_is_reported_and_allowed_by_name(name, what, parts):
    rest = [FIRST, SECOND, COMMIT, wait(0)]
    with pytest.warns(RaceWarning, match=what) as found:
        run(*parts, *rest, allow_missing=[name])
    assert len(found) == 1
    with pytest.raises(RaceError, match=what):
        run(*parts, *rest, allow_missing=set(ptxemu.FENCES) - {name})
    with pytest.raises(RaceError, match='used before its wait'), warnings.catch_warnings():
        warnings.simplefilter('ignore', RaceWarning)
        run(*parts, FIRST, COMMIT, allow_missing=ptxemu.FENCES)
    with pytest.raises(PTXError, match="allow_missing takes of .* not .'fence'"):
        run(*parts, *rest, allow_missing=['fence'])


def test_uninitialised_operands_are_reported():
    with pytest.raises(MemoryFault, match='uninitialised'):
        run(READY.replace('st.shared.v4.b32 [%r2+8192]', 'st.shared.v4.b32 [%r2+0]'), SECOND, COMMIT, wait(0),
            check_races=False, check_uninit=True)


def test_a_warpgroup_goes_together():
    with pytest.raises(Deadlock):
        run(READY, 'setp.lt.u32 %p1, %t, 32;\n@%p1 bra OUT;\n', FIRST, 'OUT:\n', BAR, COMMIT, wait(0), check_races=False)
    run(READY, 'setp.lt.u32 %p1, %t, 32;\n@%p1 bra IN;\nadd.u32 %r9, %t, 0;\nIN:\n', FIRST, COMMIT, wait(0))
    with pytest.raises(Unsupported, match='incomplete warpgroups'):
        run(READY, FIRST, COMMIT, wait(0), threads=64)
    with pytest.raises(PTXError, match='different matrix descriptors'):
        run(READY, 'cvt.u64.u32 %d12, %t; add.u64 %d10, %d10, %d12;\n', FIRST, COMMIT, wait(0))


@pytest.mark.parametrize('change,error,what', [
    (1 << 13, MemoryFault, 'out-of-bounds shared access of a wgmma'), (1 << 49, Unsupported, 'base offset'),
    (1 << 62, Unsupported, 'without a swizzle')])
def test_bad_descriptors(change, error, what):
    with pytest.raises(error, match=what):
        run(READY, f'xor.b64 %d10, %d10, {change};\n', FIRST, COMMIT, wait(0))


def test_a_profile_counts_what_a_wgmma_reads():
    p = Profile()
    run(READY, FIRST, FIRST, COMMIT, wait(0), check_races=False, profile=p)
    assert p['mma bf16'] == 2 * 2 * 4                                     # CTAs, products, warps
    assert p['mma bf16 flops'] == 2 * 2 * (2 * 64 * 64 * 16)
    assert p['wgmma wavefronts'] == 2 * 2 * 64 * 16 * 2 // 128            # of B; A is in registers
    p = Profile()
    product(32, 'bf16', 64, 'K', False, profile=p)
    assert p['wgmma wavefronts'] == 4 * (64 + 32) * 16 * 2 // 128


# ---- compiled code --------------------------------------------------------------------------

torch = pytest.importorskip('torch')
triton = pytest.importorskip('triton')
ARGS = dict(D=64, BM=64, BN=64)


@functools.lru_cache(1)
def attention():
    args, want = attention_case(256, 1, 64, torch.bfloat16)
    compiled, names = ptxemu.compile_triton(attention_kernel, args, ARGS, num_stages=3, arch=90)
    return args, want, compiled, names


def attend(ptx, **checks):
    args, want, compiled, names = attention()
    args['out'].zero_()
    run_ptx(ptx, compiled.metadata.name, 4, 128, [args[n] for n in names], compiled.metadata.shared, **checks)
    return (args['out'].double() - want).abs().max() < 2e-2


def test_triton_attention_for_hopper():
    ptx = attention()[2].asm['ptx']
    assert 'wgmma.mma_async' in ptx
    assert attend(ptx, check_races=True, check_uninit=True, check_conflicts=True)


def test_two_warpgroups_share_an_operand():
    args, want = attention_case(256, 2, 64, torch.float16)
    for lanes in (4096, 256):                               # all CTAs together, one after another
        args['out'].zero_()
        run_triton(attention_kernel, (2, 2), args, dict(D=64, BM=128, BN=64), num_warps=8, arch=90, check_races=True,
                   check_uninit=True, check_conflicts=True, max_lanes=lanes)
        assert (args['out'].double() - want).abs().max() < 2e-3


def test_triton_tf32_products_for_hopper():
    a, b, c = torch.randn(128, 64), torch.randn(64, 64), torch.zeros(128, 64)
    compiled = run_triton(matmul_kernel, (2, 1), dict(a=a, b=b, c=c, M=128, N=64, K=64),
                          dict(BM=64, BN=64, BK=32, PREC='tf32'), arch=90, check_races=True, check_uninit=True)
    assert 'f32.tf32.tf32' in compiled.asm['ptx']
    want = a.double() @ b.double()
    assert (c - want).abs().max() / want.abs().max() < 5e-3


def mutants(ptx, pattern, replacement):
    """The code with the lines that match changed, one at a time, and the number of the line."""
    lines = ptx.splitlines()
    for i, line in enumerate(lines):
        if re.search(pattern, line):
            yield i, '\n'.join(lines[:i] + [re.sub(pattern, replacement, line)] + lines[i + 1:])


@pytest.mark.parametrize('pattern,replacement,least', [
    (r'fence\.proxy\.async\S*;', '', 1), (r'wgmma\.wait_group\.sync\.aligned\s+0;', '', 2),
    (r'wait_group\.sync\.aligned\s+0;', 'wait_group.sync.aligned 1;', 2), (r'wgmma\.fence\.sync\.aligned;', '', 2),
    (r'wgmma\.commit_group\.sync\.aligned;', '', 2), (r'cp\.async\.wait_group\s+\d+;', '', 2)])
def test_mutants_of_compiled_code_are_reported(pattern, replacement, least):
    # Of two proxy fences, that before the loop is of no use: each step has one.
    ptx = attention()[2].asm['ptx']
    found = []
    for line, mutant in mutants(ptx, pattern, replacement):
        try:
            attend(mutant, check_races=True)
        except RaceError:
            found.append(line)
    assert len(found) >= least


def test_a_wrong_swizzle_of_compiled_code_is_seen_in_the_result():
    seen = []
    for _, mutant in mutants(attention()[2].asm['ptx'], r'46116862933\d+', lambda m: str(int(m[0]) ^ (1 ^ 2) << 62)):
        try:
            seen.append(not attend(mutant))
        except MemoryFault:
            seen.append(True)
    assert seen and all(seen)
