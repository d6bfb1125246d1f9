"""What a published folder holds."""
