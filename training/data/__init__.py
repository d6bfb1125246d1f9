"""Raw tables to interactions, interactions to corpora, corpora to batches."""
