"""The notebooks, and `python -m notebooks.execute`, which runs them."""
