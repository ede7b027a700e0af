"""bytelane inside vLLM: `vllm serve` of a wNa8o8 checkpoint runs bytelane's layers, with no flag.

    pip install bytelane        # beside vLLM
    vllm serve MODEL            # or: bytelane serve MODEL

vLLM calls `register` in each of its processes (the entry point `vllm.general_plugins`). It registers a configuration
class for `compressed-tensors` and one for `gemma`; both are vLLM's public hooks. A checkpoint that is not wNa8o8 gets
vLLM's own configuration object, untouched.

    plugin     version window, switch, registration
    config     which layer gets which method
    table      which modules of the checkpoint are quantized, and how (knows nothing of vLLM)
    parts      what one rank holds of one module, taken from vLLM's stream of tensors
    runs       the arithmetic: parts that run as one call, and sums over ranks (knows nothing of vLLM)
    reduce     int32 sums over ranks
    linear     the linear method; row-parallel layers requantize once, after the reduction
    embedding  embedding tables and heads

What is served how, and what is exact: docs/serving.md.
"""

from bytelane.integrations.vllm.plugin import SWITCH, VERSIONS, register

__all__ = ["SWITCH", "VERSIONS", "register"]
