"""Matrix products: FLOPs against the arithmetic, dtypes, and the calls of libraries."""

import jax
import jax.numpy as jnp
import pytest

from jaxmp.plan import hlo, products


def found(fn, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return products.products(hlo.parse(jax.jit(fn).lower(*arguments).compile().as_text()))


def test_a_product_has_two_flops_a_multiplication():
    (product,) = found(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (3, 8, 16), (3, 16, 4))
    assert product.kind == "dot"
    assert product.flops == 2 * 3 * 8 * 16 * 4
    assert product.dtypes == "float32 x float32 -> float32"
    assert product.wide
    assert product.source.startswith(__file__)


def test_products_in_a_loop_count_each_round():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=5)[0]

    (product,) = found(fn, (8, 8))
    assert product.times == 5
    assert product.flops == 5 * 2 * 8**3


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_what_meets_data(stride):
    def fn(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    rows = found(fn, (2, 9, 9, 4), (3, 3, 4, 8))
    assert {row.kind for row in rows} == {"convolution"}
    side = (9 - 3) // stride + 1
    assert sum(row.flops for row in rows) == 2 * 2 * side * side * 9 * 4 * 8


def entry(line: str, *parameters: str) -> hlo.Module:
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(parameters)]
    body = "\n".join([*lines, f"  ROOT %r = {line}"])
    return hlo.parse(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


def test_padding_and_holes_of_a_convolution_do_no_work():
    # A TPU writes a product batched over 8 as a convolution over a dilated axis of 8.
    module = entry(
        "bf16[8,16,4]{2,1,0} convolution(%p0, %p1), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
        "dim_labels=0bf_0io->0bf",
        "bf16[8,16,32]{2,1,0}",
        "bf16[8,32,4]{2,1,0}",
    )
    (product,) = products.products(module)
    assert product.flops == 2 * 8 * 16 * 32 * 4


def test_a_librarys_product():
    module = entry(
        "(bf16[8,4]{1,0}, s8[64]{0}) custom-call(%p0, %p1), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        "bf16[8,16]{1,0}",
        "bf16[16,4]{1,0}",
    )
    (product,) = products.products(module)
    assert (product.dtypes, product.flops) == ("bfloat16 x bfloat16 -> bfloat16", 2 * 8 * 16 * 4)


@pytest.mark.parametrize(("target", "matrices"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_fused_attention(target, matrices):
    module = entry(
        "(f16[2,4,64,16]{3,2,1,0}, u8[0]{0}) custom-call(%p0, %p0, %p0), "
        f'custom_call_target="__cudnn$fmha{target}", backend_config={{"cudnn_fmha_backend_config":'
        '{"intermediate_tensor_shape":{"dimensions":["2","4","64","64"]}}}',
        "f16[2,64,4,16]{3,2,1,0}",
    )
    (product,) = products.products(module)
    assert product.kind == "attention"
    assert product.operands == ("float16",) * 3
    assert product.flops == matrices * 2 * 2 * 4 * 64 * 64 * 16
    assert not product.wide


def test_rows_are_summed_by_dtypes():
    rows = found(lambda x, y: (x @ y) @ (x @ y), (8, 8), (8, 8))
    assert products.by_dtypes(rows) == {"float32 x float32 -> float32": (2, 2 * 2 * 8**3)}
