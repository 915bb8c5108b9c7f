"""What a load takes, found without reading weights.

Must not know pictures.
"""
