"""One pure step, on one device or many."""

from jaxmp.training.exchange import layer_gatherer as layer_gatherer
from jaxmp.training.mesh import batch_sharding as batch_sharding
from jaxmp.training.mesh import make_mesh as make_mesh
from jaxmp.training.sharding import state_shardings as state_shardings
from jaxmp.training.state import TrainState as TrainState
from jaxmp.training.step import cast_inputs as cast_inputs
from jaxmp.training.step import jit_step as jit_step
from jaxmp.training.step import make_eval_step as make_eval_step
from jaxmp.training.step import make_train_step as make_train_step
from jaxmp.training.step import value_and_grad as value_and_grad
