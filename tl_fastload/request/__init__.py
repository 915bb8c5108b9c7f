"""What is asked for: the arguments of a load, of which kind each may be, sorted by who takes them.

Must not know what is done about them.
"""
