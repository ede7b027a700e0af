"""Decoder layers whose every operation is bytelane's: two native calls a layer, the same bits in any batch.

transformers' decoder layers run a dozen small modules between the linear ones. On a CPU a token of a small model spends
more time in calling those than in reading weights, and torch's sums change their last bits with the batch, the threads
and the pieces a prompt comes in. `install` gives the decoder layers of a loaded model another `forward` that computes
the same formulas (csrc/cpu/float_ops.hpp, attention.hpp), rounded to the activation dtype where transformers rounds:

    parts.py      what a layer consists of, read off transformers' own modules, by architecture
    merge.py      projections that read one tensor as one matrix, each with its own output scale
    native.py     a layer as one native object
    outline.py    what a step of one token needs beside the layers: places in caches, angles, embedding, logits
    stack.py      one token through all layers in one native call
    norms.py      the norms of a model on a CUDA device, one launch each
    token_step.py one token through all layers on a CUDA device, ten launches a layer
    forward.py    the forward itself: native; or step by step, the same bits, where a linear layer is watched or foreign

Modules, names and classes stay transformers'. A call that asks for more than the layer's result (attention weights,
gradients, another device, `torch.compile`) takes transformers' own forward.
"""

from bytelane.decoder.forward import FloatOps, install_decoder, refusals
from bytelane.decoder.merge import merge
from bytelane.decoder.stack import DecodeStack

__all__ = ["DecodeStack", "FloatOps", "install_decoder", "merge", "refusals"]
