"""A step's gradient in, one row of numbers out."""
