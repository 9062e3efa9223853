"""Mixed-precision training for JAX: transforms, a framework, and instruments."""

from jaxmp import nn as nn
from jaxmp import numerics as numerics
from jaxmp import optim as optim
from jaxmp import plan as plan
from jaxmp import precision as precision
from jaxmp import training as training
from jaxmp.numerics.formats import FloatFormat as FloatFormat
from jaxmp.numerics.formats import explain as explain
from jaxmp.numerics.formats import format_of as format_of
from jaxmp.numerics.tree import all_finite as all_finite
from jaxmp.numerics.tree import cast_floating as cast_floating
from jaxmp.numerics.tree import global_norm as global_norm
from jaxmp.numerics.tree import select_tree as select_tree
from jaxmp.optim.recipes import adamw as adamw
from jaxmp.optim.recipes import ema_of as ema_of
from jaxmp.optim.recipes import recipe as recipe
from jaxmp.optim.recipes import sgd as sgd
from jaxmp.optim.scaling import loss_scale_of as loss_scale_of
from jaxmp.optim.scaling import with_loss_scale as with_loss_scale
from jaxmp.precision.autocast import autocast as autocast
from jaxmp.precision.autocast import explain_autocast as explain_autocast
from jaxmp.precision.autocast import full_precision as full_precision
from jaxmp.precision.loss_scale import DynamicLossScale as DynamicLossScale
from jaxmp.precision.loss_scale import LossScale as LossScale
from jaxmp.precision.loss_scale import NoOpLossScale as NoOpLossScale
from jaxmp.precision.loss_scale import StaticLossScale as StaticLossScale
from jaxmp.precision.policy import Policy as Policy
from jaxmp.precision.policy import cast_to_full as cast_to_full
from jaxmp.precision.policy import cast_to_half as cast_to_half
from jaxmp.precision.policy import get_policy as get_policy
from jaxmp.precision.policy import half_dtype as half_dtype
from jaxmp.training.state import TrainState as TrainState
from jaxmp.training.step import jit_step as jit_step
from jaxmp.training.step import make_eval_step as make_eval_step
from jaxmp.training.step import make_train_step as make_train_step
from jaxmp.training.step import value_and_grad as value_and_grad

__version__ = "0.1.0"
