"""Tensors that record what is done to them, and evaluating what they recorded.

Must not know files, names of parameters, or any library above torch.
"""
