"""Let a table grow: embed only the images that it lacks, and keep the rows of the others."""
