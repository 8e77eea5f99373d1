"""Keras MobileNets on small images, as an ordinary Flower App."""

import os

# TensorFlow reads this when it is loaded. Without it, TensorFlow uses oneDNN's kernels only on
# processors with AVX-512; elsewhere, the default network trains 1.7 times as fast with them.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
