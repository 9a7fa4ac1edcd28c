"""Encoded pictures and captions, named by what made them, in storage and on the local disk."""
