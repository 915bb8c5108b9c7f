"""What all roads from a pretrained model to a live one have in common: one call, what a road is
asked for, what it records.

Must not know any road, nor TransformerLens.
"""
