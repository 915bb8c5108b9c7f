"""Models whose parameters lie in several processes: which part each holds, how it gets it, and how
the parts work together (torch.distributed's FSDP2 and DTensor).

Must not know names of parameters, or TransformerLens.
"""
