"""What happens to a gradient?"""

from jaxmp.optim.clipping import clip_by_global_norm as clip_by_global_norm
from jaxmp.optim.clipping import clip_by_unit_norm as clip_by_unit_norm
from jaxmp.optim.clipping import clip_by_value as clip_by_value
from jaxmp.optim.decay import decay_mask as decay_mask
from jaxmp.optim.recipes import RECIPES as RECIPES
from jaxmp.optim.recipes import Recipe as Recipe
from jaxmp.optim.recipes import adamw as adamw
from jaxmp.optim.recipes import ema_of as ema_of
from jaxmp.optim.recipes import in_float32 as in_float32
from jaxmp.optim.recipes import params_ema as params_ema
from jaxmp.optim.recipes import recipe as recipe
from jaxmp.optim.recipes import sgd as sgd
from jaxmp.optim.scaling import LossScaleState as LossScaleState
from jaxmp.optim.scaling import loss_scale_of as loss_scale_of
from jaxmp.optim.scaling import with_loss_scale as with_loss_scale
from jaxmp.optim.schedules import warmup_constant as warmup_constant
from jaxmp.optim.schedules import warmup_cosine as warmup_cosine
from jaxmp.optim.schedules import warmup_rsqrt as warmup_rsqrt
from jaxmp.optim.schedules import warmup_stable_decay as warmup_stable_decay
