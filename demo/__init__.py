"""The demo, and the recipe of the embedded model that it loads."""
