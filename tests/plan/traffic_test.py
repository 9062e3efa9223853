"""Bytes moved: known programs, each correction of the formula, and the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import hlo, traffic


def moved(body: str, **settings) -> float:
    """Bytes of a program given as the lines of its entry, other computations before it."""
    return traffic.bytes_accessed(hlo.parse("HloModule m\n\n" + body), **settings)


def compiled(fn, *arguments):
    return jax.jit(fn).lower(*arguments).compile()


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_one_kernel_reads_its_operands_and_writes_its_result():
    text = compiled(lambda x, y: jnp.sin(x) * y, array(256, 4), array(256, 4)).as_text()
    assert traffic.bytes_accessed(hlo.parse(text)) == 3 * 256 * 4 * 4


def test_it_agrees_with_the_compilers_own_count_where_there_is_one():
    def fn(x, y):
        return jnp.sum(jax.nn.gelu(x @ y), axis=0) + 1

    program = compiled(fn, array(64, 128), array(128, 32))
    counted = traffic.bytes_accessed(hlo.parse(program.as_text()))
    assert counted == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)


def test_a_loop_counts_each_of_its_rounds():
    def loop(length):
        def fn(x):
            return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=length)[0]

        return traffic.bytes_accessed(hlo.parse(compiled(fn, array(64, 64)).as_text()))

    one_round = (loop(30) - loop(10)) / 20
    assert 3 * 64 * 64 * 4 <= one_round <= 5 * 64 * 64 * 4 + 64


SLICES = """%fused (p: f32[1000], i: s32[]) -> f32[10] {
  %p = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[10]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={10}
  ROOT %n = f32[10]{0} negate(%s)
}

ENTRY %main (a: f32[1000], j: s32[]) -> f32[10] {
  %a = f32[1000]{0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[10]{0} fusion(%a, %j), kind=kLoop, calls=%fused
}
"""


def test_a_fused_slice_reads_what_it_takes():
    assert moved(SLICES) == 40 + 4 + 40


def test_a_slice_of_a_slice_reads_the_inner_one():
    text = SLICES.replace("ROOT %n = f32[10]{0} negate(%s)", "ROOT %n = f32[5]{0} slice(%s)")
    assert moved(text.replace("f32[10]{0} fusion", "f32[5]{0} fusion")) == 20 + 4 + 20


NESTED = """%slicing (q: f32[1000], k: s32[]) -> f32[10] {
  %q = f32[1000]{0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %s = f32[10]{0} dynamic-slice(%q, %k), dynamic_slice_sizes={10}
}

%updating (r: f32[1000], u: f32[10], l: s32[]) -> f32[1000] {
  %r = f32[1000]{0} parameter(0)
  %u = f32[10]{0} parameter(1)
  %l = s32[] parameter(2)
  ROOT %d = f32[1000]{0} dynamic-update-slice(%r, %u, %l)
}

%fused (p: f32[1000], o: f32[1000], i: s32[]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %o = f32[1000]{0} parameter(1)
  %i = s32[] parameter(2)
  %t = f32[10]{0} fusion(%p, %i), kind=kLoop, calls=%slicing
  ROOT %n = f32[1000]{0} fusion(%o, %t, %i), kind=kLoop, calls=%updating
}

ENTRY %main (a: f32[1000], b: f32[1000], j: s32[]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[1000]{0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = f32[1000]{0} fusion(%a, %b, %j), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_within_a_fusion_touches_what_its_slices_and_updates_do():
    assert moved(NESTED) == 40 + 4 + 40


UPDATE = """%fused (p: f32[1000], u: f32[10], i: s32[]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %u = f32[10]{0} parameter(1)
  %i = s32[] parameter(2)
  %n = f32[10]{0} negate(%u)
  ROOT %d = f32[1000]{0} dynamic-update-slice(%p, %n, %i)
}

ENTRY %main (a: f32[1000], b: f32[10], j: s32[]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %f = f32[1000]{0} fusion(%a, %b, %j), kind=kLoop, calls=%fused
}
"""


def test_an_update_in_place_touches_what_changes():
    assert moved(UPDATE) == 40 + 4 + 40


def test_only_the_most_expensive_branch_of_a_conditional_counts():
    text = """%cheap (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%dear (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%q)
}

ENTRY %main (c: pred[], x: f32[8]) -> f32[8] {
  %c = pred[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %r = f32[8]{0} conditional(%c, %x, %x), branch_computations={%cheap, %dear}
}
"""
    assert moved(text) == 64


def test_scratch_space_of_a_library_call_counts_nothing():
    text = """ENTRY %main (x: bf16[4,8], y: bf16[8,2]) -> (bf16[4,2], s8[4096]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,2]{1,0} parameter(1)
  ROOT %g = (bf16[4,2]{1,0}, s8[4096]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm"
}
"""
    assert moved(text) == 2 * (32 + 16 + 8)


def test_a_buffer_that_is_only_allocated_counts_nothing():
    text = """ENTRY %main () -> f32[100] {
  ROOT %b = f32[100]{0} custom-call(), custom_call_target="AllocateBuffer"
}
"""
    assert moved(text) == 0


PREFETCH = """ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %s = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[100]{0:S(1)} copy-done(%s)
  ROOT %n = f32[100]{0} negate(%d)
}
"""


def test_on_chip_memory_is_left_out_when_asked():
    assert moved(PREFETCH) == 4 * 400
    assert moved(PREFETCH, on_chip=True) == 2 * 400


GATHERED = """%fused (p: bf16[100,50], b: bf16[50], i: s32[100,2]) -> f32[100] {
  %p = bf16[100,50]{1,0} parameter(0)
  %b = bf16[50]{0} parameter(1)
  %i = s32[100,2]{1,0} parameter(2)
  %r = bf16[100,50]{1,0} broadcast(%b), dimensions={1}
  %s = bf16[100,50]{1,0} add(%p, %r)
  %w = f32[100,50]{1,0} convert(%s)
  %g = f32[100]{0} gather(%w, %i), offset_dims={}, collapsed_slice_dims={0,1}, slice_sizes={1,1}
  ROOT %n = ROOT_HERE
}

ENTRY %main (a: bf16[100,50], c: bf16[50], j: s32[100,2]) -> f32[100] {
  %a = bf16[100,50]{1,0} parameter(0)
  %c = bf16[50]{0} parameter(1)
  %j = s32[100,2]{1,0} parameter(2)
  ROOT %f = f32[100]{0} fusion(%a, %c, %j), kind=kLoop, calls=%fused
}
"""


def test_arithmetic_that_is_only_picked_from_reads_what_is_picked():
    picked = GATHERED.replace("ROOT_HERE", "f32[100]{0} negate(%g)")
    # A number of 16 bits from each row, as much of the bias at most, the places, and the result.
    assert moved(picked) == 100 * 2 + 50 * 2 + 100 * 2 * 4 + 100 * 4
    summed = "f32[100]{0} reduce(%w, %g), dimensions={1}, to_apply=%sum"
    assert moved(GATHERED.replace("ROOT_HERE", summed)) == 100 * 50 * 2 + 50 * 2 + 800 + 400
