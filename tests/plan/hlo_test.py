"""The HLO reader: on programs compiled here, and on lines of the kinds only other compilers write."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import hlo


def compiled(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arguments).compile().as_text()


def test_it_reads_a_program_compiled_here():
    module = hlo.parse(compiled(lambda x, y: jnp.tanh(x @ y), (8, 16), (16, 4)))
    assert [p.shapes[0].dims for p in module.entry.parameters] == [(8, 16), (16, 4)]
    assert module.entry.root.shapes == (hlo.Array("f32", (8, 4)),)
    assert module.executions[module.entry.name] == 1
    names = {i.attribute("op_name") for _, i, _ in module.instructions()}
    assert any("tanh" in name for name in names)


def test_a_loop_runs_its_body_as_often_as_it_counts():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=7)[0]

    module = hlo.parse(compiled(fn, (16, 16)))
    loops = [i for i in module.entry.instructions if i.opcode == "while"]
    assert [module.trip_count(module.entry, loop) for loop in loops] == [7]
    assert module.executions[loops[0].calls["body"][0]] == 7


COUNTED = """%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %same = (s32[], f32[4]{0}) copy(%c)
}

%condition (d: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %d = (s32[], f32[4]{0}) parameter(0)
  %count = s32[] get-tuple-element(%d), index=0
  ROOT %lt = pred[] compare(%count, %bound), direction=LT
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %start = s32[] constant(2)
  %tuple = (s32[], f32[4]{0}) tuple(%start, %x)
  ROOT %loop = (s32[], f32[4]{0}) while(%tuple), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("change", "times"),
    [({}, 30), ({"constant(32)": "get-tuple-element(%d), index=0"}, 1), ({"=LT": "=GT"}, 1)],
    ids=["counted", "unknown bound", "counting down"],
)
def test_a_loop_without_a_note_is_counted_by_its_condition(change, times):
    """As a TPU's compiler writes them."""
    text = COUNTED
    for old, new in change.items():
        text = text.replace(old, new)
    module = hlo.parse("HloModule m\n\n" + text)
    assert module.executions["body"] == times


def test_it_names_the_line_of_the_users_code():
    def fn(x):
        return jnp.sum(x @ x)

    module = hlo.parse(compiled(fn, (16, 16)))
    here = fn.__code__.co_firstlineno + 1
    sources = {module.source(i) for _, i, _ in module.instructions()}
    assert f"{__file__}:{here}" in sources


def test_it_knows_which_parameters_are_reused():
    step = jax.jit(lambda state, batch: (state + jnp.sum(batch), batch * 2), donate_argnums=0)
    shapes = [jax.ShapeDtypeStruct((32,), jnp.float32), jax.ShapeDtypeStruct((9,), jnp.float32)]
    module = hlo.parse(step.lower(*shapes).compile().as_text())
    assert module.aliases == {0}


def test_shapes_with_tuples_layouts_and_memory_spaces():
    text = "(bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, (f32[], /*index=2*/s4[3]{0}), u32[]{:S(2)})"
    arrays = hlo.parse_shapes(text)
    assert [a.dtype for a in arrays] == ["bf16", "f32", "s4", "u32"]
    assert [a.bytes for a in arrays] == [64, 4, 2, 4]
    assert [a.space for a in arrays] == [1, 0, 0, 2]


@pytest.mark.parametrize(
    ("short", "width", "name"),
    [
        ("bf16", 16, "bfloat16"),
        ("f32", 32, "float32"),
        ("f8e4m3fn", 8, "float8_e4m3fn"),
        ("pred", 8, "bool"),
        ("s32", 32, "int32"),
        ("u4", 4, "uint4"),
        ("c64", 64, "complex64"),
    ],
)
def test_names_and_widths_of_dtypes(short, width, name):
    assert hlo.bits(short) == width
    assert hlo.numpy_name(short) == name


def test_an_attribute_ends_where_it_ends():
    text = """HloModule m

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} custom-call(%a), custom_call_target="one, two", metadata={op_name="x/y" \
stack_frame_id=4}, backend_config={"known":{"n":"3"},"text":"a}b"}
}
"""
    call = hlo.parse(text).entry.root
    assert call.attribute("custom_call_target") == "one, two"
    assert call.attribute("op_name") == "x/y"
    assert call.attribute("stack_frame_id") == "4"
    assert call.backend_config == {"known": {"n": "3"}, "text": "a}b"}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not an XLA program"):
        hlo.parse("module @jit_f { }")
