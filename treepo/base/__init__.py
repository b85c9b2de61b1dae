"""The floor of the house: what every room may import. Standard library and torch only."""
