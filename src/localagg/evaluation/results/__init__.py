"""Results of a run: protocols, the results.json file, and comparison with published numbers."""
