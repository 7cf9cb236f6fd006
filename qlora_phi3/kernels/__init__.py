"""Operations of a Phi-3 layer whose forward and backward are written out, without autograd.

One operation per file: plain torch, which is the reference, and beside it a Triton kernel that rounds where
the reference does. CUDA tensors take the kernel where Triton works, all others the reference; `using` chooses
otherwise. Tensors have a row per token; whatever is computed in half precision is summed in float32, as
transformers does. Each names which of its arguments it writes over.
"""

from .backend import Backend, using

__all__ = ["Backend", "using"]
