"""How good explanations are for the seconds that they take: every method a point, or a curve over what it is given."""
