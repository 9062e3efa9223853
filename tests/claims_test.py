"""What people say of mixed precision and of stable training, whether it is right, and which test holds it.

The statements are those of a widely read account of the subject, in its order. Where one is wrong, what
is right stands behind it.
"""

import pathlib
import re

import pytest

FORMATS, SPECTRUM = "numerics/formats_test.py", "diagnose/spectrum_test.py"
GAINS, CHAIN, CLOSED = (
    "diagnose/layer_gains_test.py",
    "optim/chain_test.py",
    "optim/closed_forms_test.py",
)
STEP, WARMUP = "training/step_test.py", "scripts/warmup_experiment_test.py"

CLAIMS = (
    ("float16 reaches from 6e-8 to 65504: right, from its smallest subnormal number",
     f"{FORMATS}::test_limits_equal_finfo_exactly {FORMATS}::test_float16_range"),
    ("float32 reaches to 1.7e38: no, to 3.4028e38; the significand is nearly 2",
     f"{FORMATS}::test_float32_max_has_its_significand"),
    ("float32 reaches much further than float16: 277 powers of two against 40",
     f"{FORMATS}::test_binades"),
    ("bfloat16 is an IEEE 754 format: no, it is float32 with its low half rounded off",
     f"{FORMATS}::test_which_are_ieee_754 "
     f"{FORMATS}::test_bfloat16_is_float32_with_the_low_half_rounded_off"),
    ("a number is its sign, exponent and fraction bits",
     f"{FORMATS}::test_every_code_decodes_as_the_hardware_cast_and_encodes_back"),
    ("bfloat16 keeps float32's range: its normal numbers', and XLA computes with no subnormals of it",
     f"{FORMATS}::test_bfloat16_keeps_float32s_normals_but_not_its_max_or_subnormals "
     f"{FORMATS}::test_xla_computes_with_float16_subnormals_but_not_with_float32s"),
    ("networks feel exponent bits more than mantissa bits",
     "numerics/rounding_test.py::test_training_needs_exponent_bits_more_than_mantissa_bits"),
    ("decimal numbers in binary", f"{FORMATS}::test_explain_a_tenth"),
    ("a leading 1 is implied: in normal numbers only",
     f"{FORMATS}::test_implicit_bit_is_one_for_normals_only"),
    ("five exponent bits are one sign and four bits: no, the exponent is biased and two codes are reserved",
     f"{FORMATS}::test_any_ieee_like_format_follows_the_textbook"),
    ("float16's largest number is 15 x 1.999: no, 2^15 x 1.999; from 65520 on it rounds to infinity",
     f"{FORMATS}::test_float16_range {FORMATS}::test_rounding_thresholds_of_float16"),
    ("float16's smallest number is 2^-24: and what is at most 2^-25 flushes, which is what counts",
     f"{FORMATS}::test_rounding_thresholds_of_float16"),
    ("forward in 16 bits, gradients and updates in float32: no, the backward pass runs in 16 bits, too; "
     "master parameters, moments and the update are float32",
     f"{STEP}::test_products_of_both_passes_are_16_bit_and_state_is_float32 "
     f"{CHAIN}::test_the_master_keeps_updates_that_half_precision_loses "
     f"{CLOSED}::test_a_weight_stands_still_at_this_multiple_of_its_update"),
    ("16 bits save memory: of activations, while the state stays at 16 bytes a parameter with its master",
     "plan/budget_test.py::test_16_bits_save_activations_and_no_state"),
    ("backpropagation is a product of Jacobians",
     f"{SPECTRUM}::test_backpropagation_is_a_product_of_jacobians"),
    ("a linear layer's Jacobian is its weight",
     f"{SPECTRUM}::test_the_jacobian_of_a_linear_layer_is_its_weight "
     f"{GAINS}::test_dense_norm_is_the_spectral_norm"),
    ("gradients explode in LayerNorm and self-attention: neither has a useful bound for all inputs",
     f"{GAINS}::test_layer_norm_gain_is_the_largest_singular_value "
     f"{GAINS}::test_the_epsilon_bounds_the_gain "
     f"{SPECTRUM}::test_dot_product_attention_has_no_lipschitz_constant"),
    ("the gradient of a square may be infinite: it is unbounded, 2 R on [-R, R]",
     f"{SPECTRUM}::test_the_square_has_slope_two_r_on_an_interval "
     f"{SPECTRUM}::test_stacked_squares_overflow_float16_early_and_have_degree_two_to_the_depth"),
    ("the Lipschitz constant is the largest slope",
     f"{SPECTRUM}::test_every_value_is_a_lower_bound_and_enough_steps_give_all "
     f"{SPECTRUM}::test_a_stack_stretches_by_at_most_the_product_of_its_blocks"),
    ("larger slopes are more expressive and less stable: bounded blocks hold at large rates",
     f"{WARMUP}::test_bounded_blocks_need_no_warmup"),
    ("convolutions are linear, attention is of a high order: softmax attention has no degree at all",
     f"{GAINS}::test_convolution_spectrum_equals_the_dense_one "
     f"{SPECTRUM}::test_non_homogeneous_functions_leave_a_residual"),
    ("ResNets stack homogeneous operators: without biases, and but for BatchNorm",
     f"{SPECTRUM}::test_homogeneous_functions_have_their_degree"),
    ("transformers are harder to train",
     f"{WARMUP}::test_post_ln_stays_at_chance_without_warmup_and_warmup_rescues_it"),
    ("they want larger weight decay: decoupled decay, which Adam does not cancel",
     f"{CHAIN}::test_decoupled_decay_is_a_product_whatever_adam_does "
     f"{CHAIN}::test_weights_settle_where_decay_balances_random_steps "
     f"{CLOSED}::test_decay_inside_adam_is_cancelled_by_its_division"),
    ("they want longer warm-up: Adam's first step is the rate in each coordinate, whatever the gradient",
     f"{CHAIN}::test_adams_first_step_is_the_sign_of_the_gradient "
     f"{CHAIN}::test_schedules_meet_their_end_points_exactly "
     f"{WARMUP}::test_post_ln_stays_at_chance_without_warmup_and_warmup_rescues_it"),
    ("they want smaller rates: how far the loss depends on the rate is a figure",
     "run/scan_test.py::test_sensitivity_is_the_mean_excess_over_the_best_and_divergence_counts_as_a_guess"),
    ("this prevents vanishing gradients: no, it controls updates; gradients and updates are told apart",
     "diagnose/flow_test.py::test_updates_are_judged_next_to_their_weights"),
    ("SGD serves small convolutional nets, and the recipes say so with their evidence",
     f"{CHAIN}::test_recipes_name_their_evidence_and_take_overrides"),
    ("Adam uses a second derivative: no, a second moment; it is blind to the scale down to epsilon",
     f"{CLOSED}::test_adams_second_moment_is_no_second_derivative "
     f"{CLOSED}::test_adam_is_blind_to_the_gradients_scale_until_epsilon"),
    ("clip or scale gradients and weights: and only what skips survives a NaN",
     "optim/spike_test.py::test_what_bad_batches_cost_under_each_remedy "
     "optim/spike_test.py::test_only_what_skips_survives_nan "
     "optim/weights_test.py::test_singular_values_obey_the_cap_in_every_layer_of_a_stack"),
    ("gradients vanish in the first layers: by the layers' gain, to the power of the depth",
     "diagnose/flow_test.py::test_a_deep_random_net_shrinks_gradients_by_its_gain_each_layer"),
)  # fmt: skip


@pytest.mark.parametrize(("claim", "tests"), CLAIMS, ids=[claim[:40] for claim, _ in CLAIMS])
def test_each_claim_has_its_tests(claim, tests):
    for place in tests.split():
        path, name = place.split("::")
        text = (pathlib.Path(__file__).parent / path).read_text()
        assert re.search(rf"def {name}\(", text), f"{claim}: there is no {place}"
