"""Training, evaluation and publishing: raw table → corpora → three stages → figures → the folder that the Hub gets."""
