"""Processed copies on disk, and the cache of them.

Must not know the hub, or how a recipe is evaluated.
"""
