"""A pretrained model in Hugging Face's terms, as a tree of promises.

Must not know TransformerLens.
"""
