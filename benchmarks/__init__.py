"""One command per claim of performance; each prints ratios that were measured in one run."""
