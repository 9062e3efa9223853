"""What `import jaxmp.nn` may load."""

import subprocess
import sys


def test_nnx_is_loaded_only_by_its_users_and_no_backend_starts():
    code = (
        "import sys, jaxmp.nn\n"
        "jaxmp.nn.models.GPT, jaxmp.nn.linen.init, jaxmp.nn.functional.dot\n"
        "assert 'flax.nnx' not in sys.modules\n"
        "jaxmp.nn.nnx.split\n"
        "assert 'flax.nnx' in sys.modules\n"
        "try: jaxmp.nn.nonsense\n"
        "except AttributeError as e: assert 'nonsense' in str(e)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
