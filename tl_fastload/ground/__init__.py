"""What everything stands on: versions, words, what torch wraps around models, functions with other
globals, our own defaults, and what may leave the public functions.

Must not know anything of the package but its errors.
"""
