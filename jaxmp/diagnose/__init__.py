"""Where was range lost?"""

from jaxmp.diagnose.flow import GradientFlow as GradientFlow
from jaxmp.diagnose.flow import flow_at_taps as flow_at_taps
from jaxmp.diagnose.flow import gradient_flow as gradient_flow
from jaxmp.diagnose.flow import new_tap as new_tap
from jaxmp.diagnose.flow import tap as tap
from jaxmp.diagnose.layer_gains import Gains as Gains
from jaxmp.diagnose.layer_gains import attention_logits as attention_logits
from jaxmp.diagnose.layer_gains import attention_statistics as attention_statistics
from jaxmp.diagnose.layer_gains import center_norm_gain as center_norm_gain
from jaxmp.diagnose.layer_gains import conv_singular_values as conv_singular_values
from jaxmp.diagnose.layer_gains import dense_norm as dense_norm
from jaxmp.diagnose.layer_gains import entropy_lower_bound as entropy_lower_bound
from jaxmp.diagnose.layer_gains import layer_norm_gain as layer_norm_gain
from jaxmp.diagnose.layer_gains import rms_norm_gain as rms_norm_gain
from jaxmp.diagnose.magnitudes import Magnitudes as Magnitudes
from jaxmp.diagnose.probe import new_probe as new_probe
from jaxmp.diagnose.probe import probe as probe
from jaxmp.diagnose.ranges import RangeAudit as RangeAudit
from jaxmp.diagnose.ranges import audit_ranges as audit_ranges
from jaxmp.diagnose.ranges import tensor_ranges as tensor_ranges
from jaxmp.diagnose.spectrum import frobenius_norm as frobenius_norm
from jaxmp.diagnose.spectrum import homogeneity_degree as homogeneity_degree
from jaxmp.diagnose.spectrum import jacobian_spectrum as jacobian_spectrum
from jaxmp.diagnose.spectrum import lipschitz as lipschitz
from jaxmp.diagnose.spectrum import stack_spectrum as stack_spectrum
