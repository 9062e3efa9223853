"""Will it fit hardware we lack?"""

from jaxmp.plan.compile import compile_for as compile_for
from jaxmp.plan.cost import Estimate as Estimate
from jaxmp.plan.cost import estimate as estimate
