"""numpy-only: a Flower App with a logistic regression in numpy."""
