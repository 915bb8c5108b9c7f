"""Recipes into the parameters of any module: order, device, strides, in place.

Must not know Hugging Face, or TransformerLens.
"""
