"""Which number goes where?"""

from jaxmp.precision.loss_scale import DynamicLossScale as DynamicLossScale
from jaxmp.precision.loss_scale import LossScale as LossScale
from jaxmp.precision.loss_scale import NoOpLossScale as NoOpLossScale
from jaxmp.precision.loss_scale import StaticLossScale as StaticLossScale
from jaxmp.precision.policy import Policy as Policy
from jaxmp.precision.policy import cast_to_full as cast_to_full
from jaxmp.precision.policy import cast_to_half as cast_to_half
from jaxmp.precision.policy import get_policy as get_policy
from jaxmp.precision.policy import half_dtype as half_dtype
