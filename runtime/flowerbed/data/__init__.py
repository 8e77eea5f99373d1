"""The data of the lab's devices: place.py deals a data set out, placed.py reads what it wrote."""
