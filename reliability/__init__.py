"""Whether the project keeps its word on inputs that it was not made for."""
