"""One pure step."""

from jaxmp.training.state import TrainState as TrainState
from jaxmp.training.step import cast_inputs as cast_inputs
from jaxmp.training.step import jit_step as jit_step
from jaxmp.training.step import make_eval_step as make_eval_step
from jaxmp.training.step import make_train_step as make_train_step
from jaxmp.training.step import value_and_grad as value_and_grad
