"""The three training stages and the loop that they share."""
