"""Operations of a Phi-3 layer whose forward and backward are written out, without autograd.

One operation per file. Tensors have a row per token; whatever is computed in half precision is summed in
float32, as transformers does. Each names which of its arguments it writes over.
"""
