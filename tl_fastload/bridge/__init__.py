"""TransformerLens' TransformerBridge: booted and processed on promises, then placed.

Must not know HookedTransformer, planning, copies.
"""

from tl_fastload.ground import compat

compat.require_bridge()
