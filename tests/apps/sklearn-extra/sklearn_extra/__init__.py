"""sklearn-extra: a Flower App with a linear classifier of scikit-learn."""
