"""What can a number hold?"""

from jaxmp.numerics.formats import FORMATS as FORMATS
from jaxmp.numerics.formats import Explanation as Explanation
from jaxmp.numerics.formats import FloatFormat as FloatFormat
from jaxmp.numerics.formats import compare as compare
from jaxmp.numerics.formats import decode as decode
from jaxmp.numerics.formats import encode as encode
from jaxmp.numerics.formats import explain as explain
from jaxmp.numerics.formats import format_of as format_of
from jaxmp.numerics.rounding import quantize as quantize
from jaxmp.numerics.rounding import simulate_cast as simulate_cast
from jaxmp.numerics.tree import all_finite as all_finite
from jaxmp.numerics.tree import cast_floating as cast_floating
from jaxmp.numerics.tree import global_norm as global_norm
from jaxmp.numerics.tree import norm_and_finite as norm_and_finite
from jaxmp.numerics.tree import select_tree as select_tree
