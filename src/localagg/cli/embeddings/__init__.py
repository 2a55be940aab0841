"""Commands on the embeddings of a run or table."""
