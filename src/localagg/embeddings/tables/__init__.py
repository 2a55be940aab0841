"""Write tables of embeddings: resumable, in several formats, growing by new images."""
