"""What people do with an embedding: write it as a table, and search it."""
