"""Flowerbed: federated learning on unequal devices as a Flower App."""
