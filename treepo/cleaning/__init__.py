"""Cleaning training data by rules: one rule a function, from problems to what becomes of them."""
