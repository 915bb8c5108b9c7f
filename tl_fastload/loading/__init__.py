"""The order of events of a load, and weights into live models.

Must not know planning.
"""
