"""text-tokens: a Flower App with an embedding bag in numpy."""
