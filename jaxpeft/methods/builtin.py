"""The methods of this package, one line per family. Importing this module registers them."""

from jaxpeft.methods.adalora import config as adalora
from jaxpeft.methods.kernels import ia3, loha, lokr, oft, vera
from jaxpeft.methods.leaves import bitfit, full, ln_tuning, trainable_tokens
from jaxpeft.methods.lora import config as lora
from jaxpeft.methods.prompts import multitask_prompt, p_tuning, prefix, prompt
from jaxpeft.methods.registry import register_method

_ALL = (
    lora.KIND,
    full.KIND,
    prompt.KIND,
    p_tuning.KIND,
    multitask_prompt.KIND,
    prefix.KIND,
    adalora.KIND,
    oft.KIND,
    ln_tuning.KIND,
    bitfit.KIND,
    ia3.KIND,
    loha.KIND,
    lokr.KIND,
    vera.KIND,
    trainable_tokens.KIND,
)

for _kind in _ALL:
    register_method(_kind)
