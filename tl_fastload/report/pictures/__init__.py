"""Pictures of reports, plans and models. Needs matplotlib, the extra "plots"."""
