"""Ranking of the whole catalogue, baselines, and the results of a run."""
