"""Which files hold a model, where in them each tensor lies, and bytes out of them.

Must not know what a tensor is for, how it may be quantized, or that TransformerLens exists.
"""
