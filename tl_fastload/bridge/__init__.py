"""TransformerLens' TransformerBridge: booted and processed on promises, then placed.

Must not know HookedTransformer, planning, copies.
"""
