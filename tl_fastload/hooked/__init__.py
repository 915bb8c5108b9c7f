"""TransformerLens' HookedTransformer: its own code run on promises, and the empty model.

Must not know planning, copies or reports.
"""
