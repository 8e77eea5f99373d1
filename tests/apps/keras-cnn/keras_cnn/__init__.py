"""keras-cnn: a Flower App with a small Keras CNN and NumPyClient."""
