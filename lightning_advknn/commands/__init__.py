"""The commands: each calls make, measure and show."""
