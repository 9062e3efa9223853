"""Will it fit hardware we lack?"""

from jaxmp.plan.compile import compile_for as compile_for
